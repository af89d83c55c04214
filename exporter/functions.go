package exporter

import "github.com/gptoss-conformance/gptoss/exporter/onnxpb"

type function struct{}

func (f *function) message(opsets []*onnxpb.OperatorSetIdProto) *onnxpb.FunctionProto { return nil }

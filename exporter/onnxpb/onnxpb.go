// Package onnxpb holds the messages of ONNX files, generated from onnx.proto:
// the part of the format that is used here, with ONNX's own field numbers.
package onnxpb

// Any protoc will do (Debian's protobuf-compiler; or pip's grpcio-tools, as
// `python -m grpc_tools.protoc`); the Go plugin's version is the module's.
//
//go:generate go build -o ../../build/protoc-gen-go google.golang.org/protobuf/cmd/protoc-gen-go
//go:generate protoc -I. --plugin=protoc-gen-go=../../build/protoc-gen-go --go_out=. --go_opt=paths=source_relative onnx.proto

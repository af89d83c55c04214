package exporter

import (
	"fmt"
	"strconv"

	"google.golang.org/protobuf/proto"

	"github.com/gptoss-conformance/gptoss/exporter/onnxpb"
	"github.com/gptoss-conformance/gptoss/reference/checkpoint"
)

// Keys of a graph's metadata.
const (
	MetadataCheckpoint = "gptoss.checkpoint" // digest of the checkpoint
	MetadataPrecision  = "gptoss.precision"
	metadataOperators  = "gptoss.operators"
	metadataExperts    = "gptoss.experts"
	metadataLength     = "gptoss.sequence_length"
	metadataCache      = "gptoss.kv_cache"
	metadataFunctions  = "gptoss.functions"
	metadataLast       = "gptoss.last_logits_only"
	metadataHidden     = "gptoss.hidden_states"
	metadataDebug      = "gptoss.block_debug"
)

// dynamicLength stands for any number of tokens.
const dynamicLength = "dynamic"

// describe fills in who made the graph, from what and how.
func describe(model *onnxpb.ModelProto, m *checkpoint.Model, o Options, digest string) {
	model.ProducerName = proto.String(Producer)
	if o.Version != "" {
		model.ProducerVersion = proto.String(o.Version)
	}
	length := dynamicLength
	if o.SequenceLength > 0 {
		length = strconv.Itoa(o.SequenceLength)
	}
	for _, p := range [][2]string{
		{MetadataCheckpoint, digest},
		{metadataOperators, string(o.Operators)},
		{metadataExperts, string(o.Experts)},
		{MetadataPrecision, string(o.Precision)},
		{metadataLength, length},
		{metadataCache, strconv.FormatBool(o.KVCache)},
		{metadataFunctions, strconv.FormatBool(o.Functions)},
		{metadataLast, strconv.FormatBool(o.LastLogitsOnly)},
		{metadataHidden, strconv.FormatBool(o.HiddenStates)},
		{metadataDebug, strconv.FormatBool(o.BlockDebug)},
	} {
		model.MetadataProps = append(model.MetadataProps, &onnxpb.StringStringEntryProto{
			Key: proto.String(p[0]), Value: proto.String(p[1]),
		})
	}
	model.Graph.DocString = proto.String(fmt.Sprintf("gpt-oss, %d layers, %d experts. Values are named as the taps of the conformance suite.",
		m.Config.Layers, m.Config.Experts))
}

// OptionsOf returns the options that a graph of ours was exported with, and the
// digest of its checkpoint: with them the same bytes can be made again.
func OptionsOf(model *onnxpb.ModelProto) (o Options, digest string, err error) {
	if model.GetProducerName() != Producer {
		return o, "", fmt.Errorf("the graph was made by %q, not by %s", model.GetProducerName(), Producer)
	}
	properties := map[string]string{}
	for _, p := range model.MetadataProps {
		properties[p.GetKey()] = p.GetValue()
	}
	get := func(key string) string {
		value, ok := properties[key]
		if !ok && err == nil {
			err = fmt.Errorf("the graph's metadata lacks %s", key)
		}
		return value
	}
	truth := func(key string) bool {
		value, parseError := strconv.ParseBool(get(key))
		if parseError != nil && err == nil {
			err = fmt.Errorf("the graph's metadata has %s = %q", key, properties[key])
		}
		return value
	}
	o = Options{
		Operators: Operators(get(metadataOperators)), Experts: Experts(get(metadataExperts)), Precision: Precision(get(MetadataPrecision)),
		KVCache: truth(metadataCache), Functions: truth(metadataFunctions), LastLogitsOnly: truth(metadataLast),
		HiddenStates: truth(metadataHidden), BlockDebug: truth(metadataDebug), Version: model.GetProducerVersion(),
	}
	if length := get(metadataLength); length != dynamicLength && err == nil {
		o.SequenceLength, err = strconv.Atoi(length)
	}
	digest = get(MetadataCheckpoint)
	if err == nil {
		err = o.check()
	}
	return o, digest, err
}

package faults

import (
	"bytes"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"text/template"

	"github.com/sebdah/goldie/v2"
	"github.com/stretchr/testify/require"
)

// TestREADME keeps the README's tables those of the catalogue. After a change:
//
//	go test ./conformance/faults -run README -update
func TestREADME(t *testing.T) {
	type stage struct {
		Name   string
		Faults []Fault
	}
	page := struct {
		Count, Same, Like, Unseen int
		Stages                    []stage
	}{Count: len(All())}
	titles := []struct{ stage, title string }{
		{stageEmbedding, "Embedding"}, {stageRMSNorm, "RMSNorm"}, {stageRope, "RoPE"}, {stageAttention, "Attention"},
		{stageGating, "Router"}, {stageExperts, "Experts"}, {stageLogits, "Logits"},
		{stageGeneration, "Generation with a KV cache"},
	}
	for _, s := range titles {
		section := stage{Name: s.title}
		for _, f := range All() {
			if f.Stage == s.stage {
				section.Faults = append(section.Faults, f)
			}
		}
		page.Stages = append(page.Stages, section)
	}
	for _, f := range All() {
		switch {
		case f.Thread == "":
			page.Unseen++
		case f.Related:
			page.Like++
		default:
			page.Same++
		}
	}
	text, err := template.New("README.md.tmpl").Funcs(template.FuncMap{"thread": threadLink}).ParseFiles("README.md.tmpl")
	require.NoError(t, err)
	var readme bytes.Buffer
	require.NoError(t, text.Execute(&readme, page))
	goldie.New(t, goldie.WithFixtureDir("."), goldie.WithNameSuffix(".md")).Assert(t, "README", readme.Bytes())
}

// threadLink is a Markdown link: the repository's name and the thread's number.
func threadLink(f Fault) (string, error) {
	if f.Thread == "" {
		return "", nil
	}
	u, err := url.Parse(f.Thread)
	if err != nil {
		return "", err
	}
	part := strings.Split(strings.Trim(u.Path, "/"), "/") // owner, repository, pull or issues, number
	if len(part) != 4 {
		return "", fmt.Errorf("%s: %s is not a thread", f.ID, f.Thread)
	}
	link := fmt.Sprintf("[%s %s](%s)", part[1], part[3], f.Thread)
	if f.Related {
		link = "like " + link
	}
	return link, nil
}

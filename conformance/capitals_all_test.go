//go:build twolayer

package conformance_test

func init() { allQuestions = true }

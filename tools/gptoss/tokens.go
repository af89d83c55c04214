package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/gptoss-conformance/gptoss/reference/config/strictjson"
)

// parseTokens reads the value of --tokens: ids separated by commas, or the path
// of a JSON file that holds an array of ids. Whether an id is in the vocabulary
// is the model's business.
func parseTokens(value string) ([]int32, error) {
	if strings.Trim(value, "0123456789-, ") == "" {
		return parseTokenList(value)
	}
	tokens, err := readTokens(value)
	if err != nil {
		return nil, fmt.Errorf("--tokens: %w", err)
	}
	return tokens, nil
}

func parseTokenList(value string) ([]int32, error) {
	fields := strings.Split(value, ",")
	tokens := make([]int32, len(fields))
	for i, field := range fields {
		id, err := strconv.ParseInt(strings.TrimSpace(field), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("--tokens: %q is no token id: want ids separated by commas, or a JSON file", field)
		}
		tokens[i] = int32(id)
	}
	return tokens, nil
}

func readTokens(path string) ([]int32, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var tokens []int32
	reader, err := strictjson.NewReader(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	err = reader.Array(func(i int) error {
		id, err := reader.Int()
		if err != nil {
			return fmt.Errorf("token %d %w", i, err)
		}
		if id < 0 || id > math.MaxInt32 {
			return fmt.Errorf("token %d is %d, which is no id", i, id)
		}
		tokens = append(tokens, int32(id))
		return nil
	})
	if err == nil && len(tokens) == 0 {
		err = errors.New("holds no ids")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: want a JSON array of ids: %w", path, err)
	}
	return tokens, nil
}

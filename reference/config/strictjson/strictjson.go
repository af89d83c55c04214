// Package strictjson reads JSON that strangers wrote, where encoding/json is
// too kind: a key that occurs twice, text after the value and invalid UTF-8 are
// errors here, keys match to the letter, and nothing is read into a value of
// another type. It streams, so that memory stays near the size of the input.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// maxDepth is far more than any file that we read nests (3), and far less than
// what recursion can bear.
const maxDepth = 64

// maxKeyBytes keeps error messages, which repeat keys, readable. The longest
// tensor name of gpt-oss has 50 bytes.
const maxKeyBytes = 1024

// Reader walks through one JSON value.
type Reader struct {
	decoder *json.Decoder
	depth   int
}

// NewReader checks that data is one JSON value and returns a reader of it.
func NewReader(data []byte) (*Reader, error) {
	if !utf8.Valid(data) {
		return nil, errors.New("is not valid UTF-8")
	}
	// Validity first: then the walk below can't meet a syntax error, and text
	// after the value is found even if the caller stops early.
	if !json.Valid(data) {
		var any json.RawMessage
		if err := json.Unmarshal(data, &any); err != nil {
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				return nil, fmt.Errorf("is not valid JSON: %v at byte %d", err, syntax.Offset)
			}
			return nil, fmt.Errorf("is not valid JSON: %v", err)
		}
		return nil, errors.New("is not valid JSON")
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	return &Reader{decoder: decoder}, nil
}

// Object calls field for every member. The function must read the member's
// value, with one call of a method of the reader.
func (r *Reader) Object(field func(key string) error) error {
	if err := r.open('{', "an object"); err != nil {
		return err
	}
	seen := map[string]bool{}
	for r.decoder.More() {
		token, err := r.decoder.Token()
		if err != nil {
			return err
		}
		key := token.(string) // JSON is valid, so a key is a string
		if len(key) > maxKeyBytes {
			return fmt.Errorf("a key has %d bytes; at most %d are accepted", len(key), maxKeyBytes)
		}
		if seen[key] {
			return fmt.Errorf("key %q occurs twice", key)
		}
		seen[key] = true
		if err := field(key); err != nil {
			return err
		}
	}
	return r.close()
}

// Array calls element for every element. The function must read it.
func (r *Reader) Array(element func(i int) error) error {
	if err := r.open('[', "an array"); err != nil {
		return err
	}
	for i := 0; r.decoder.More(); i++ {
		if err := element(i); err != nil {
			return err
		}
	}
	return r.close()
}

func (r *Reader) open(want json.Delim, what string) error {
	token, err := r.decoder.Token()
	if err != nil {
		return err
	}
	if token != want {
		return fmt.Errorf("is %s, not %s", describe(token), what)
	}
	if r.depth++; r.depth > maxDepth {
		return fmt.Errorf("nests more than %d levels", maxDepth)
	}
	return nil
}

func (r *Reader) close() error {
	r.depth--
	_, err := r.decoder.Token()
	return err
}

// Value reads a string, json.Number, bool or nil (for null).
func (r *Reader) Value() (any, error) {
	token, err := r.decoder.Token()
	if err != nil {
		return nil, err
	}
	if _, ok := token.(json.Delim); ok {
		return nil, fmt.Errorf("is %s, not a plain value", describe(token))
	}
	return token, nil
}

// String reads a string.
func (r *Reader) String() (string, error) {
	token, err := r.decoder.Token()
	if err != nil {
		return "", err
	}
	s, ok := token.(string)
	if !ok {
		return "", fmt.Errorf("is %s, not a string", describe(token))
	}
	return s, nil
}

// Int reads a number that is written as an integer and fits.
func (r *Reader) Int() (int, error) {
	token, err := r.decoder.Token()
	if err != nil {
		return 0, err
	}
	number, ok := token.(json.Number)
	if !ok {
		return 0, fmt.Errorf("is %s, not an integer", describe(token))
	}
	i, err := strconv.Atoi(number.String())
	if err != nil {
		return 0, fmt.Errorf("is %.30s, not an integer of 64 bits", number)
	}
	return i, nil
}

// Raw reads any value and returns its text. Duplicate keys inside it are found
// by the reader that is made of it.
func (r *Reader) Raw() (json.RawMessage, error) {
	var raw json.RawMessage
	err := r.decoder.Decode(&raw)
	return raw, err
}

// Kind names what a raw value is, for error messages.
func Kind(raw json.RawMessage) string {
	if len(raw) == 0 {
		return "nothing"
	}
	switch raw[0] {
	case '{':
		return "an object"
	case '[':
		return "an array"
	case '"':
		return "a string"
	case 't', 'f':
		return "a truth value"
	case 'n':
		return "null"
	}
	return "a number"
}

func describe(token json.Token) string {
	switch t := token.(type) {
	case json.Delim:
		if t == '{' {
			return "an object"
		}
		return "an array"
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case bool:
		return "a truth value"
	}
	return "null"
}

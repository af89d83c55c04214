// Command vocabulary prints the tokens of gpt-oss, a line for each: its bytes in
// base64, and its id.
package main

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"os"

	"github.com/gptoss-conformance/gptoss/fixtures/tokenizer"
)

func main() {
	w := bufio.NewWriter(os.Stdout)
	defer w.Flush()
	for id := range int32(tokenizer.VocabSize) {
		b, err := tokenizer.Decode([]int32{id})
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(w, base64.StdEncoding.EncodeToString(b), id)
	}
}

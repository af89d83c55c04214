// Checks the goldens of golden.py against npm's gpt-tokenizer, which shares no
// code with OpenAI's.
//
//   node gpt_tokenizer.mjs NODE_MODULES fixtures/tokenizer/testdata/encode.json
//
// gpt-tokenizer 4.0.0 misses most special tokens after the first of a text, so
// texts with special tokens are split before they are compared. It also misses
// merges with U+FEFF, which tiktoken makes: a text with one is left out.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const [, , modules, path] = process.argv
if (!path) {
  console.error('usage: node gpt_tokenizer.mjs NODE_MODULES ENCODE.json')
  process.exit(2)
}
const { encode } = await import(pathToFileURL(join(modules, 'gpt-tokenizer/esm/encoding/o200k_harmony.js')))
const golden = JSON.parse(readFileSync(path, 'utf8'))
const plain = (text) => encode(text, { disallowedSpecial: new Set() })
const special = (text) =>
  text.split(/(<\|[a-z0-9_]+\|>)/).flatMap((part) =>
    /^<\|.*\|>$/.test(part) ? encode(part, { allowedSpecial: 'all' }) : plain(part))

let different = 0
const check = (want, got, text) => {
  if (JSON.stringify(want) === JSON.stringify(got)) return
  different++
  console.error(`${JSON.stringify(text)}\n  golden ${want}\n  npm    ${got}`)
}
for (const { text, ids } of golden.texts) if (!text.includes('\ufeff')) check(ids, plain(text), text)
for (const { text, ids } of golden.special) check(ids, special(text), text)
console.log(`${golden.texts.length + golden.special.length} texts, ${different} differ`)
process.exit(different ? 1 : 0)

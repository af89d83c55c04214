"""Times the Go reference beside other engines, on the same checkpoint, with the same
threads, one after the other in one run, and prints a table in markdown.

  python tools/bench/compare.py [--layers 2|24] [--float32] [--genai] [--write reference/README.md]

Engines that are not there are left out and named below the table. Each runs in a
process of its own, so that its peak memory is known:

gptoss           the reference (tools/bench), float32
onnxruntime      gptoss export --operators onnxruntime --kv-cache, float32
llama.cpp        tools/bench/gguf_checkpoint.py's GGUF; it rounds activations to 8 bits
transformers     eager attention, bfloat16; with --float32 in float32 too, which takes
                 18 GiB for two layers
torch            OpenAI's model, bfloat16 (in float32 it does not fit 24 GiB)
genai            onnxruntime-genai's float32 graph, with --genai (`make genai`): 13 GB
                 and a minute to build, unless export.py --genai has left one

With more than two layers only the first three run: the others do not fit.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import measure

sys.path.insert(0, str(measure.ROOT / "tools" / "oracles"))

DECODED = PROMPT = 16  # decoding: 16 tokens after a prompt of 16, in every engine
ENGINES = ["gptoss", "onnxruntime", "llama.cpp", "transformers f32", "transformers bf16", "torch bf16", "genai f32"]
DEEP = ENGINES[:3]
DUELS = 4  # turns that the reference and llama.cpp take in decoding


def tokens_of(config, count):
    """The tokens that every engine but llama.cpp runs on; that one draws its own."""
    import counter

    return [(int(w) >> 32) % config["vocab_size"] for w in counter.words(1, "prompt.full", 0, count)]


def config_of(checkpoint):
    return json.loads((Path(checkpoint) / "config.json").read_text())


# The engines in Python. Each is a generator of (work, seconds) in a process of its own.


def run_torch(o):
    import torch

    torch.set_num_threads(o.threads)
    import torch_model
    from checkpoints import Checkpoint

    checkpoint, opened = Checkpoint(o.checkpoint), []
    yield "open the checkpoint", measure.fastest(lambda: opened.append(torch_model.load(checkpoint, "bfloat16")), 1)
    model, config = opened[0], checkpoint.config
    with torch.inference_mode():
        for count in o.prefill:
            if count > 16:
                continue  # its gather copies 4 experts per token: 128 tokens take 25 GB
            ids = torch.tensor(tokens_of(config, count), dtype=torch.int32)
            yield f"prefill {count}, all logits", measure.fastest(lambda: model(ids), o.repeats)
        one = torch.tensor(tokens_of(config, 1), dtype=torch.int32)
        yield "decode one token", measure.fastest(lambda: model(one), o.repeats)


def run_transformers(o):
    """From Hugging Face's layout: MXFP4, as released, in bfloat16. For float32 dense,
    which needs less memory to open."""
    import torch

    torch.set_num_threads(o.threads)
    import transformers_model
    from checkpoints import Checkpoint

    checkpoint, opened = Checkpoint(o.checkpoint), []
    yield "open the checkpoint", measure.fastest(lambda: opened.append(transformers_model.load(checkpoint, o.precision)), 1)
    model, config = opened[0], checkpoint.config
    with torch.inference_mode():
        for count in o.prefill:
            ids = torch.tensor([tokens_of(config, count)])
            yield f"prefill {count}, all logits", measure.fastest(lambda: model(ids, use_cache=False), o.repeats)
            yield f"prefill {count}, last logits", measure.fastest(lambda: model(ids, use_cache=False, logits_to_keep=1), o.repeats)
        ids = torch.tensor([tokens_of(config, PROMPT + DECODED)])

        def decode(cache):
            for at in range(PROMPT, PROMPT + DECODED):
                model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)

        caches = [model(ids[:, :PROMPT], use_cache=True).past_key_values for _ in range(o.repeats)]
        yield "decode one token", measure.fastest(lambda: decode(caches.pop()), o.repeats) / DECODED


def session_of(graph, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Widen all weights once, when the graph is loaded: the runtime leaves those
    # of more than 1 GiB to every run, which would cost it half of its speed.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(1 << 34))
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def feeds_of(session, config, tokens):
    """The inputs of our graph or of onnxruntime-genai's, with an empty cache."""
    import numpy as np

    feeds = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            ids = np.array(tokens, np.int64)
            feeds[value.name] = ids if len(value.shape) == 1 else ids[None]
        elif value.name == "past_length":
            feeds[value.name] = np.zeros(1, np.int64)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, len(tokens)), np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.arange(len(tokens), dtype=np.int64)[None]
        else:
            feeds[value.name] = np.zeros((1, config["num_key_value_heads"], 0, config["head_dim"]), np.float32)
    return feeds


def run_onnxruntime(o):
    import numpy as np

    config, opened = config_of(o.checkpoint), []
    yield "open the checkpoint", measure.fastest(lambda: opened.append(session_of(o.graph, o.threads)), 1)
    session = opened[0]
    for count in o.prefill:
        feeds = feeds_of(session, config, tokens_of(config, count))
        yield f"prefill {count}, {o.logits} logits", measure.fastest(lambda: session.run(["logits"], feeds), o.repeats)
    if o.logits != "last":
        return
    past = [value.name for value in session.get_inputs() if ".past_" in value.name]
    present = [name.replace(".past_", ".present_") for name in past]
    tokens = tokens_of(config, PROMPT + DECODED)
    first = session.run(present, feeds_of(session, config, tokens[:PROMPT]))

    def decode():
        cache = first
        for at in range(PROMPT, PROMPT + DECODED):
            feeds = {"input_ids": np.array(tokens[at : at + 1]), "past_length": np.array([at])}
            cache = session.run(["logits", *present], feeds | dict(zip(past, cache)))[1:]

    yield "decode one token", measure.fastest(decode, o.repeats) / DECODED


WORKERS = {"torch": run_torch, "transformers": run_transformers, "onnxruntime": run_onnxruntime}


def worker(o):
    for work, seconds in WORKERS[o.worker](o):
        print(json.dumps({"work": work, "seconds": seconds}), flush=True)


# The parent: one function per engine, which yields the runs that it took.


class Bench:
    def __init__(self, o):
        self.o, self.config, self.machine = o, config_of(o.checkpoint), measure.Machine(o.threads)
        self.gptoss_command = measure.build("./tools/gptoss")
        self.works = {}  # engine -> work -> seconds
        self.resident, self.anonymous = {}, {}  # engine -> bytes
        self.missing = {}  # engine -> why
        self.notes = []

    def python(self, worker, checkpoint, *more):
        command = [sys.executable, __file__, "--worker", worker, "--checkpoint", checkpoint, "--threads", self.o.threads,
                   "--repeats", self.o.repeats, "--prefill", ",".join(map(str, self.o.prefill)), *more]
        return measure.Run(command, {"OMP_NUM_THREADS": str(self.o.threads), "HF_HUB_OFFLINE": "1"})

    def own(self, *flags):
        """The reference's program."""
        command = [self.machine.bench, "--checkpoint", self.o.checkpoint, "--repeats", self.o.repeats, *flags]
        return measure.Run(command, {"GOMAXPROCS": str(self.o.threads)})

    def gptoss(self, directory):
        run = self.own("--prefill", ",".join(map(str, self.o.prefill)))
        yield run, run.lines()
        if self.config["num_hidden_layers"] <= 2:
            truth = self.own("--prefill=", "--decode=false", "--float64")
            yield None, [line for line in truth.lines() if "float64" in line["work"]]
            print(f"float64 truth: {measure.gibibytes(truth.anonymous)} GiB anonymous", file=sys.stderr)

    def onnxruntime(self, directory):
        # One graph at a time, for 24 layers take 13.8 GB of disk.
        for logits, flags in (("all", []), ("last", ["--last-logits-only"])):
            graph = directory / "m.onnx"
            measure.Run([self.gptoss_command, "export", "--checkpoint", self.o.checkpoint, "--operators", "onnxruntime",
                         "--kv-cache", "--skip-validation", "--output", graph, *flags])
            run = self.python("onnxruntime", self.o.checkpoint, "--graph", graph, "--logits", logits)
            yield run, run.lines()
            for file in directory.iterdir():
                file.unlink()

    def llama(self, directory):
        gguf = directory / "m.gguf"
        measure.Run([sys.executable, measure.ROOT / "tools/bench/gguf_checkpoint.py", self.o.checkpoint, gguf])
        common = [self.o.llama_bench, "-m", gguf, "-t", self.o.threads, "-r", self.o.repeats, "-o", "jsonl"]
        prompts = [*common, "-p", ",".join(map(str, self.o.prefill)), "-n", "0"]
        # It puts out the logits of a prompt's last token alone, and runs the last
        # layer's experts for that token alone.
        try:
            run = measure.Run(prompts)
        except measure.Killed:
            # It copies the experts into an order of its own, which makes it faster.
            self.notes.append("llama.cpp ran with --repack 0: with its copy of the experts it did not fit in memory.")
            common += ["--repack", "0"]
            run = measure.Run([*prompts, "--repack", "0"])
        yield run, [{"work": f"prefill {row['n_prompt']}, last logits", "seconds": min(row["samples_ns"]) / 1e9} for row in run.lines()]
        # Memory sets the speed of decoding, and on a shared machine its bandwidth goes
        # up and down by the minute: the two take turns, so that both meet its best.
        for _ in range(DUELS):
            run = measure.Run([*common, "-p", "0", "-n", DECODED, "-d", PROMPT])
            yield run, [{"work": "decode one token", "seconds": min(row["samples_ns"]) / 1e9 / DECODED} for row in run.lines()]
            self.add("gptoss", self.own("--prefill=").lines())

    def transformers(self, directory, precision):
        experts = "mxfp4" if precision == "bfloat16" else "dense"
        measure.Run([self.gptoss_command, "convert", "--from", self.o.checkpoint, "--to", "huggingface", "--experts", experts, "--output", directory / "hf"])
        run = self.python("transformers", directory / "hf", "--precision", precision)
        yield run, run.lines()

    def torch(self, directory):
        run = self.python("torch", self.o.checkpoint)
        yield run, run.lines()

    def genai(self, directory):
        graph = measure.SCRATCH / f"genai-{self.config['num_hidden_layers']}" / "model.onnx"
        if not graph.exists():
            build_genai(self.o.checkpoint, graph.parent)
        run = self.python("onnxruntime", self.o.checkpoint, "--graph", graph, "--logits", "all")
        yield run, run.lines()

    def add(self, name, lines):
        """The fastest of all runs counts."""
        works = self.works.setdefault(name, {})
        for line in lines:
            works[line["work"]] = min(line["seconds"], works.get(line["work"], line["seconds"]))

    def collect(self):
        engines = {
            "gptoss": self.gptoss, "onnxruntime": self.onnxruntime, "llama.cpp": self.llama,
            "transformers f32": lambda d: self.transformers(d, "float32"),
            "transformers bf16": lambda d: self.transformers(d, "bfloat16"),
            "torch bf16": self.torch, "genai f32": self.genai,
        }
        for name in self.o.engines:
            with tempfile.TemporaryDirectory(prefix="compare-", dir=measure.SCRATCH) as directory:
                try:
                    for run, lines in engines[name](Path(directory)):
                        self.add(name, lines)
                        if run:
                            self.resident[name] = max(self.resident.get(name, 0), run.resident)
                            self.anonymous[name] = max(self.anonymous.get(name, 0), run.anonymous)
                except (measure.Failed, OSError) as error:
                    self.missing[name] = str(error)
            print(f"{name}: {self.missing.get(name, 'done')}", file=sys.stderr, flush=True)
            self.machine.measure()
        self.machine.second_opinion()

    # What a piece of work must at least read or compute, from the configuration.

    def token_bytes(self):
        """What decoding reads: everything but the experts that are not chosen and
        the other rows of the embedding. Biases, norms and the short cache do not count."""
        c, query, kv = self.config, *self.widths()
        attention = 2 * c["hidden_size"] * (query + 2 * kv + query)
        experts = c["experts_per_token"] * 3 * c["intermediate_size"] * c["hidden_size"] * 17 // 32  # 16 bytes and a scale hold 32 values
        return c["num_hidden_layers"] * (attention + experts) + 2 * c["vocab_size"] * c["hidden_size"]

    def operations(self, tokens, logits):
        """Multiplications and additions of a prompt, in all layers for all tokens."""
        c, query, kv = self.config, *self.widths()
        hidden = c["hidden_size"]
        per_token = hidden * (query + 2 * kv + query) + hidden * c["num_experts"] + c["experts_per_token"] * 3 * c["intermediate_size"] * hidden
        total = c["num_hidden_layers"] * tokens * per_token
        for layer in range(c["num_hidden_layers"]):
            window = tokens if layer % 2 else c["sliding_window"]
            seen = sum(min(at + 1, window) for at in range(tokens))
            total += 2 * seen * query  # queries by keys, probabilities by values
        return 2 * (total + logits * c["vocab_size"] * hidden)

    def widths(self):
        c = self.config
        return c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]

    def share(self, work):
        """How much of the machine's limit the reference reaches."""
        seconds = self.works["gptoss"][work]
        if work.startswith("decode"):
            return f"{100 * self.token_bytes() / seconds / self.machine.read:.0f} % of the bandwidth"
        if work.startswith("prefill"):
            count = int(work.split()[1].rstrip(","))
            rate = self.operations(count, count if work.endswith("all logits") else 1) / seconds
            return f"{100 * rate / self.machine.operations:.0f} % of the peak"
        return ""

    def table(self):
        engines = [name for name in self.o.engines if name in self.works]
        works = sorted({work for name in engines for work in self.works[name]}, key=order)
        ours = self.works.get("gptoss", {})
        head, rows = ["work, seconds"], []
        for name in engines:
            head += [name, "of the limit"] if name == "gptoss" else [name]
        for work in works:
            row = [work]
            for name in engines:
                seconds = self.works[name].get(work)
                cell = "" if seconds is None else measure.seconds(seconds)
                if name == "gptoss":
                    row += [cell, self.share(work) if cell else ""]
                else:
                    row.append(f"{cell} ({ratio(seconds / ours[work])}×)" if cell and work in ours else cell)
            rows.append(row)
        for title, peak in (("peak memory, GiB", self.resident), ("of it anonymous, GiB", self.anonymous)):
            row = [title]
            for name in engines:
                row += [measure.gibibytes(peak.get(name, 0))] + [""] * (name == "gptoss")
            rows.append(row)
        layers = self.config["num_hidden_layers"]
        lines = [
            f"{layers} layers of gpt-oss-20b's width. {self.machine}. In brackets: how many times gptoss's time. "
            f"A token needs {self.token_bytes() / 1e9:.2f} GB.",
            "", measure.table(head, rows),
        ]
        notes = [self.machine.disturbed(), *self.notes] + [f"{name} is not in the table, or not whole: {why}" for name, why in self.missing.items()]
        return "\n\n".join(["\n".join(lines), *filter(None, notes)])


def order(work):
    """Opening, decoding, prefill by length, the truth."""
    if found := re.match(r"prefill (\d+), (all|last)", work):
        return 2, int(found[1]), found[2]
    return {"o": 0, "d": 1}.get(work[0], 3), 0, work


def ratio(value):
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


GENAI = """
import json, pathlib, sys, time
import genai
create = genai.builder.create_model
def timed(*arguments, **options):
    start = time.perf_counter()
    create(*arguments, **options)
    print(json.dumps({"seconds": time.perf_counter() - start}))
genai.builder.create_model = timed
genai.export(genai.Checkpoint(sys.argv[1]), "float32", pathlib.Path(sys.argv[2]))
"""


def build_genai(checkpoint, directory):
    """onnxruntime-genai's float32 graph, built by its own builder. Returns the run,
    which prepares Hugging Face's layout first, and the builder's own seconds."""
    python = measure.ROOT / "build/genai/bin/python"
    if not python.exists():
        raise measure.Failed("`make genai` installs it")
    working = directory.with_name(directory.name + ".new")
    for old in (working, directory):
        shutil.rmtree(old, ignore_errors=True)
    working.mkdir(parents=True)
    run = measure.Run([python, "-c", GENAI, checkpoint, working], {
        "PYTHONPATH": str(measure.ROOT / "tools/oracles"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(measure.SCRATCH)})
    shutil.rmtree(working / "cache", ignore_errors=True)
    working.replace(directory)
    return run, run.lines()[0]["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the generated checkpoint")
    parser.add_argument("--checkpoint", help="another checkpoint directory in OpenAI's layout")
    parser.add_argument("--engines", type=lambda text: text.split(","), help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--prefill", default="16,128,512", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--float32", action="store_true", help="transformers in float32 too: 18 GiB for two layers")
    parser.add_argument("--genai", action="store_true", help="onnxruntime-genai's float32 graph too: 13 GB for two layers")
    parser.add_argument("--llama-bench", default=measure.ROOT / "build/llama/llama-bench", help="the program of llama.cpp (`make llama`)")
    parser.add_argument("--write", metavar="DOCUMENT", help="put the table into this document")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    for name in ("--graph", "--logits", "--precision"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        return worker(o)
    measure.end_cleanly()
    o.checkpoint = o.checkpoint or measure.checkpoint(o.layers)
    layers = config_of(o.checkpoint)["num_hidden_layers"]
    if not o.engines:
        flagged = {"transformers f32": o.float32, "genai f32": o.genai}
        o.engines = DEEP if layers > 2 else [name for name in ENGINES if flagged.get(name, True)]
    unknown = set(o.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {unknown.pop()!r}; there are {', '.join(ENGINES)}")
    bench = Bench(o)
    bench.collect()
    text = bench.table()
    print(text)
    if o.write:
        measure.write(o.write, f"speed, {layers} layers", text)


if __name__ == "__main__":
    main()

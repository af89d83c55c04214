"""Times the Go reference beside other engines, on the same checkpoint, one after
the other in one run, and prints a table in markdown.

  python tools/bench/compare.py --checkpoint DIR [--engines gptoss,torch,...] [--llama-bench PATH]

Engines that are not there are left out and named below the table. Each runs in a
process of its own, so that its peak memory is known:

gptoss         the reference (tools/bench), float32
torch          OpenAI's model, bfloat16 (float32 needs 17 GiB for two layers)
transformers   eager attention, in bfloat16 or, with --float32, in float32
onnxruntime    gptoss export --operators onnxruntime, float32
llama.cpp      tools/bench/gguf_checkpoint.py's GGUF, rounds activations
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "oracles"))


def best(work, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def tokens_of(config, count):
    import counter

    return [(int(w) >> 32) % config["vocab_size"] for w in counter.words(1, "prompt.full", 0, count)]


def run_torch(o):
    import torch

    torch.set_num_threads(o.threads)
    import torch_model
    from checkpoints import Checkpoint

    checkpoint = Checkpoint(o.checkpoint)
    start = time.perf_counter()
    model = torch_model.load(checkpoint, "bfloat16")
    yield "open the checkpoint", time.perf_counter() - start
    with torch.inference_mode():
        for count in o.prefill:
            if count > 16:
                continue  # its gather copies 4 experts per token: 128 tokens take 25 GB
            ids = torch.tensor(tokens_of(checkpoint.config, count), dtype=torch.int32)
            yield f"prefill {count}, all logits", best(lambda: model(ids), o.repeats)
        one = torch.tensor(tokens_of(checkpoint.config, 1), dtype=torch.int32)
        yield "decode one token", best(lambda: model(one), o.repeats)


def run_transformers(o):
    import torch

    torch.set_num_threads(o.threads)
    import transformers_model
    from checkpoints import Checkpoint

    checkpoint = Checkpoint(o.checkpoint)
    start = time.perf_counter()
    model = transformers_model.load(checkpoint, "float32" if o.float32 else "bfloat16")
    yield "open the checkpoint", time.perf_counter() - start
    with torch.inference_mode():
        for count in o.prefill:
            ids = torch.tensor([tokens_of(checkpoint.config, count)])
            yield f"prefill {count}, all logits", best(lambda: model(ids, use_cache=False), o.repeats)
            yield f"prefill {count}, last logits", best(lambda: model(ids, use_cache=False, logits_to_keep=1), o.repeats)
        out = model(torch.tensor([tokens_of(checkpoint.config, 16)]), use_cache=True)
        one = torch.tensor([tokens_of(checkpoint.config, 1)])
        yield "decode one token", best(lambda: model(one, past_key_values=out.past_key_values, use_cache=True), o.repeats)


def run_onnxruntime(o):
    import numpy as np
    import onnxruntime

    config = json.loads((Path(o.checkpoint) / "config.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = o.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    options.enable_mem_pattern = False
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(o.graph, options, providers=["CPUExecutionProvider"])
    yield "open the checkpoint", time.perf_counter() - start
    name = session.get_inputs()[0]
    dtype = np.int64 if "int64" in name.type else np.int32
    for count in o.prefill:
        ids = np.array(tokens_of(config, count), dtype=dtype)
        yield f"prefill {count}, all logits", best(lambda: session.run(["logits"], {name.name: ids}), o.repeats)
    one = np.array(tokens_of(config, 1), dtype=dtype)
    yield "decode one token", best(lambda: session.run(["logits"], {name.name: one}), o.repeats)


WORKERS = {"torch": run_torch, "transformers": run_transformers, "onnxruntime": run_onnxruntime}


def worker(o):
    for work, seconds in WORKERS[o.worker](o):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps({"work": work, "seconds": seconds, "peak_bytes": peak}), flush=True)


def measured(command, environment):
    """Runs a command that prints JSON lines."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return lines


def llama(o):
    """llama-bench measures prompts with the last logits alone, and decoding."""
    gguf = Path(o.gguf)
    if not gguf.exists():
        subprocess.run([sys.executable, str(ROOT / "tools/bench/gguf_checkpoint.py"), o.checkpoint, str(gguf)], check=True, capture_output=True)
    command = [o.llama_bench, "-m", str(gguf), "-t", str(o.threads), "-p", ",".join(map(str, o.prefill)), "-n", "16", "-r", str(o.repeats), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for row in json.loads(done.stdout):
        fastest = max(row["samples_ts"])
        if row["n_gen"]:
            yield {"work": "decode one token", "seconds": 1 / fastest}
        else:
            yield {"work": f"prefill {row['n_prompt']}, last logits", "seconds": row["n_prompt"] / fastest}


def collect(o):
    results, missing = {}, {}
    own = ["--prefill", ",".join(map(str, o.prefill)), "--repeats", str(o.repeats)]
    for engine in o.engines:
        try:
            if engine == "gptoss":
                lines = measured(["go", "run", "./tools/bench", "--checkpoint", o.checkpoint, *own], {"GOMAXPROCS": str(o.threads)})
            elif engine == "llama.cpp":
                lines = list(llama(o))
            else:
                command = [sys.executable, __file__, "--worker", engine, "--checkpoint", o.checkpoint, "--threads", str(o.threads), *own]
                command += ["--float32"] if o.float32 else []
                command += ["--graph", o.graph] if o.graph else []
                lines = measured(command, {"OMP_NUM_THREADS": str(o.threads), "HF_HUB_OFFLINE": "1"})
            results[engine] = {line["work"]: line for line in lines}
        except (RuntimeError, OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
            missing[engine] = str(error)
        print(f"{engine}: {missing.get(engine, 'done')}", file=sys.stderr, flush=True)
    return results, missing


def table(o, results, missing):
    engines = [e for e in o.engines if e in results]
    works = []
    for engine in engines:
        works += [w for w in results[engine] if w not in works]
    print("| work, seconds | " + " | ".join(engines) + " |")
    print("|---|" + "---:|" * len(engines))
    for work in works:
        cells = []
        for engine in engines:
            line = results[engine].get(work)
            if not line:
                cells.append("")
                continue
            cell = f"{line['seconds']:.3g}"
            ours = results.get("gptoss", {}).get(work)
            if engine != "gptoss" and ours:
                cell += f" ({line['seconds'] / ours['seconds']:.2g}x ours)"
            if line.get("rate") and engine == "gptoss":
                cell += f" ({line['rate'] / 1e9:.0f} G/s)"
            cells.append(cell)
        print(f"| {work} | " + " | ".join(cells) + " |")
    print("| peak memory, GiB | " + " | ".join(
        f"{max((line.get('peak_bytes', 0) for line in results[e].values()), default=0) / 2**30:.1f}" for e in engines) + " |")
    for engine, reason in missing.items():
        print(f"\n{engine} is not in the table: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--engines", default="gptoss,onnxruntime,llama.cpp,transformers,torch", type=lambda text: text.split(","))
    parser.add_argument("--prefill", default="16,128,512", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help="transformers in float32: 18 GiB for two layers")
    parser.add_argument("--graph", help="what gptoss export --operators onnxruntime wrote; default: it is exported")
    parser.add_argument("--llama-bench", default="llama-bench", help="the program of llama.cpp")
    parser.add_argument("--gguf", help="where the GGUF is, or is written; default: a temporary file")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        return worker(o)
    with tempfile.TemporaryDirectory(prefix="gptoss-bench-") as directory:
        if "onnxruntime" in o.engines and not o.graph:
            o.graph = str(Path(directory) / "m.onnx")
            subprocess.run(["go", "run", "./tools/gptoss", "export", "--checkpoint", o.checkpoint, "--operators", "onnxruntime",
                            "--skip-validation", "--output", o.graph], cwd=ROOT, check=True, capture_output=True)
        o.gguf = o.gguf or str(Path(directory) / "m.gguf")
        table(o, *collect(o))


if __name__ == "__main__":
    main()

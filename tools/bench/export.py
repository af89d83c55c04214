"""Measures the exporter: time and memory against cp of the same bytes, what the two
operator sets cost to load and to run, and, on request, other people's exporters.

  python tools/bench/export.py [--layers 2,24] [--jax2onnx] [--genai] [--write exporter/README.md]

Each program runs in a process of its own. cp and the exports take turns; before each
the output is removed and the disk is at rest. --genai leaves its graph in build/bench
for compare.py --genai.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import compare
import measure

OPERATORS = ["portable", "onnxruntime"]
LENGTHS = [1, 16, 128]


def at_rest(source, directory, warm):
    """Removes what was written, waits for the disk, and puts the source into memory
    or out of it."""
    for file in directory.iterdir():
        file.unlink()
    os.sync()
    with open(source, "rb", buffering=0) as file:
        if warm:
            while file.read(1 << 24):
                pass
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def throughput(o, layers):
    """Time and memory of cp and of the export, in turns."""
    checkpoint = measure.checkpoint(layers)
    source = Path(checkpoint) / "model.safetensors"
    size = source.stat().st_size
    # Twice the file in memory: what is read and what is written.
    warm = 2 * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    gptoss = measure.build("./tools/gptoss")
    runs = {}
    with tempfile.TemporaryDirectory(prefix="export-", dir=measure.SCRATCH) as name:
        directory = Path(name)
        commands = {"cp": ["cp", "--reflink=never", source, directory / "copy"]}
        for operators in OPERATORS:
            commands[f"export --operators {operators}"] = [
                gptoss, "export", "--checkpoint", checkpoint, "--operators", operators,
                "--skip-validation", "--output", directory / "m.onnx"]
        for _ in range(o.repeats):
            for work, command in commands.items():
                at_rest(source, directory, warm)
                run = measure.Run(command)
                start = time.perf_counter()
                os.sync()
                run.written = run.seconds + time.perf_counter() - start
                runs.setdefault(work, []).append(run)
                print(f"{layers} layers, {work}: {run.seconds:.2f} s, on the disk after {run.written:.2f} s", file=sys.stderr, flush=True)
    copied = statistics.median(run.seconds for run in runs["cp"])
    rows = []
    for work, several in runs.items():
        times = [run.seconds for run in several]
        middle = statistics.median(times)
        rows.append([
            f"{layers} layers, {work}", measure.seconds(min(times)), measure.seconds(middle),
            measure.seconds(min(run.written for run in several)), f"{size / middle / 1e9:.2f}", f"{copied / middle:.2f}",
            measure.gibibytes(max(run.resident for run in several)), measure.gibibytes(max(run.anonymous for run in several)),
        ])
    where = "in memory" if warm else "on the disk alone"
    return rows, f"{layers} layers are {size / 1e9:.2f} GB, {where} at the start."


def run_operators(o):
    """Worker: loads a graph and runs it; the logits of all tokens come out."""
    config, opened = compare.config_of(o.checkpoint), []
    yield "load", measure.fastest(lambda: opened.append(compare.session_of(o.graph, o.threads)), 1)
    session = opened[0]
    for count in LENGTHS:
        feeds = compare.feeds_of(session, config, compare.tokens_of(config, count))
        yield str(count), measure.fastest(lambda: session.run(["logits"], feeds), o.repeats)


def operator_sets(o):
    """Load and run time of each operator set, two layers."""
    checkpoint = measure.checkpoint(2)
    rows = []
    for operators in OPERATORS:
        with tempfile.TemporaryDirectory(prefix="export-", dir=measure.SCRATCH) as directory:
            graph = Path(directory) / "m.onnx"
            export(checkpoint, operators, graph)
            run = worker(o, "operators", "--checkpoint", checkpoint, "--graph", graph)
            seconds = {line["work"]: line["seconds"] for line in run.lines()}
            rows.append([operators, measure.seconds(seconds["load"]), *(measure.seconds(seconds[str(n)]) for n in LENGTHS),
                         measure.gibibytes(run.resident), measure.gibibytes(run.anonymous)])
        print(f"operators {operators}: done", file=sys.stderr, flush=True)
    return rows


def export(checkpoint, operators, graph):
    return measure.Run([measure.build("./tools/gptoss"), "export", "--checkpoint", checkpoint, "--operators", operators,
                        "--skip-validation", "--output", graph])


def worker(o, name, *more):
    return measure.Run([sys.executable, __file__, "--worker", name, "--threads", o.threads, "--repeats", o.repeats, *more],
                       {"OMP_NUM_THREADS": str(o.threads), "ORACLE_THREADS": str(o.threads)})


# Other people's exporters.


def run_errors(o):
    """Worker: the largest error of a graph's logits within the window and beyond it,
    against the goldens that torch made in float64."""
    import numpy as np
    from safetensors.numpy import load_file

    golden, config = measure.ROOT / "golden" / "model", compare.config_of(o.checkpoint)
    if config["num_hidden_layers"] == 2:
        about = json.loads((golden / "twolayer" / "samples.json").read_text())
        truth = load_file(golden / "twolayer" / "torch.float64.safetensors")["logits"]
        tokens, rows, columns = about["tokens"], np.array(about["rows"]), np.array(about["vocabulary"])
    else:
        truth = load_file(golden / "toy128" / "torch.float64.safetensors")["logits"]
        prompts = json.loads((Path(o.checkpoint) / "prompts.json").read_text())
        tokens = next(prompt["tokens"] for prompt in prompts if prompt["name"] == "full")
        rows, columns = np.arange(len(tokens)), np.arange(config["vocab_size"])
    session = compare.session_of(o.graph, o.threads)
    first = session.get_inputs()[0]
    ours = first.name == "input_ids"
    feeds = compare.feeds_of(session, config, tokens) if ours else {first.name: np.array(tokens, np.int32)}
    name = "logits" if ours else session.get_outputs()[0].name
    logits = session.run([name], feeds)[0].reshape(len(tokens), -1)
    errors = np.abs(logits[np.ix_(rows, columns)] - truth).max(axis=1)
    beyond = rows >= config["sliding_window"]
    yield "within", float(errors[~beyond].max())
    yield "beyond", float(errors[beyond].max())


def run_jax2onnx(o):
    """Worker: jax2onnx's own model and its own conversion, as shipped, all float32."""
    import run as oracle  # noqa: F401  # sets up JAX before it is imported
    import jax
    import jax.numpy as jnp
    from checkpoints import Checkpoint
    from jax2onnx import to_onnx

    checkpoint, length = Checkpoint(o.checkpoint), 200
    if o.model == "flax":
        import flax_model

        model = flax_model.load(checkpoint, length, correct=False)
    else:
        import equinox_model

        model = equinox_model.load(checkpoint, "float32", correct=False)
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    yield "export", measure.fastest(lambda: to_onnx(
        lambda ids: model(ids), inputs=[tokens], model_name="gpt_oss", return_mode="file", output_path=o.graph), 1)


def exported_row(o, title, seconds, run, checkpoint, graph):
    """One exporter's row: time, memory, size, error."""
    found = {line["work"]: line["seconds"] for line in worker(o, "errors", "--checkpoint", checkpoint, "--graph", graph).lines()}
    size = sum(file.stat().st_size for file in graph.parent.iterdir() if file.name.startswith(graph.name))
    print(f"{title}: done", file=sys.stderr, flush=True)
    return [title, measure.seconds(seconds), measure.gibibytes(run.resident), measure.gibibytes(run.anonymous),
            f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB", *(f"{found[where]:.2g}" for where in ("within", "beyond"))]


def exporters(o):
    """Rows of ours and of theirs, and what could not be measured."""
    rows, missing = [], []

    def row(title, work):
        try:
            with tempfile.TemporaryDirectory(prefix="export-", dir=measure.SCRATCH) as directory:
                rows.append(exported_row(o, title, *work(Path(directory) / "m.onnx")))
        except (measure.Failed, OSError) as error:
            missing.append(f"{title} is not in the table: {error}")

    def ours(checkpoint, operators):
        def work(graph):
            run = export(checkpoint, operators, graph)
            return run.seconds, run, checkpoint, graph

        return work

    def jax2onnx(model):
        def work(graph):
            run = worker(o, "jax2onnx", "--checkpoint", toy128, "--graph", graph, "--model", model)
            return run.lines()[0]["seconds"], run, toy128, graph

        return work

    def genai(_):
        graph = measure.SCRATCH / "genai-2" / "model.onnx"
        run, seconds = compare.build_genai(measure.checkpoint(2), graph.parent)
        return seconds, run, measure.checkpoint(2), graph

    toy128 = measure.ROOT / "fixtures/toy128"
    if o.jax2onnx:
        for operators in OPERATORS:
            row(f"toy128, gptoss, {operators}", ours(toy128, operators))
        for model in ("flax", "equinox"):
            row(f"toy128, jax2onnx ({model})", jax2onnx(model))
    if o.genai:
        for operators in OPERATORS:
            row(f"2 layers, gptoss, {operators}", ours(measure.checkpoint(2), operators))
        row("2 layers, onnxruntime-genai, float32", genai)
    return rows, missing


WORKERS = {"operators": run_operators, "errors": run_errors, "jax2onnx": run_jax2onnx}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,24", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jax2onnx", action="store_true", help="jax2onnx's export of the fixture toy128 too")
    parser.add_argument("--genai", action="store_true", help="onnxruntime-genai's float32 builder on two layers too: 13 GB")
    parser.add_argument("--write", metavar="DOCUMENT", help="put the tables into this document")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    for name in ("--checkpoint", "--graph", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        for work, seconds in WORKERS[o.worker](o):
            print(json.dumps({"work": work, "seconds": seconds}), flush=True)
        return
    measure.end_cleanly()
    machine = measure.Machine(o.threads)
    rows, notes = [], []
    for layers in o.layers:
        more, note = throughput(o, layers)
        rows += more
        notes.append(note)
    parts = [
        f"{machine}. gpt-oss-20b's width; the smallest and the middle of {o.repeats} turns. {' '.join(notes)}",
        measure.table(["export, seconds", "least", "median", "until on the disk", "GB/s", "speed of cp", "peak memory, GiB", "of it anonymous"], rows),
        "In ONNX Runtime, two layers, the logits of all tokens, seconds:",
        measure.table(["operators", "load", *(f"{n} tokens" if n > 1 else "1 token" for n in LENGTHS), "peak memory, GiB", "of it anonymous"], operator_sets(o)),
    ]
    if o.jax2onnx or o.genai:
        theirs, missing = exporters(o)
        parts += [
            "Other exporters beside ours. The error is the largest of any logit against torch in float64, "
            "at positions within the window and beyond it:",
            measure.table(["checkpoint, exporter", "seconds", "peak memory, GiB", "of it anonymous", "files", "error within", "error beyond"], theirs),
            *missing,
        ]
    machine.measure()
    parts += filter(None, [machine.disturbed()])
    text = "\n\n".join(parts)
    print(text)
    if o.write:
        measure.write(o.write, "speed", text)


if __name__ == "__main__":
    main()

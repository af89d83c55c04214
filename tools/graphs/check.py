"""Checks the graphs that `go run ./tools/graphs` made.

    check.py DIR checker     onnx.checker's full check and strict shape inference, every graph
    check.py DIR reference   the portable graphs in onnx.reference's evaluator
    check.py DIR openvino    the portable graphs in OpenVINO

The last two compare with the float64 taps in DIR/truth.safetensors. OpenVINO has no
model-local functions: onnx's own inliner puts their nodes in their place first, and
the output says so. Every graph must run; a failure is never a skip.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

# How far from float64 truth an engine may be, as a fraction of the tap's largest
# value: the fine bounds are the judge's business, and a wrong graph is off by far
# more. In 16 bits a flipped choice of experts moves everything after it, so only
# the mean over the logits counts there.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.2, "float16": 0.05}


def safetensors(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    types = {"F64": np.float64, "F32": np.float32, "I32": np.int32}
    out = {}
    for name, t in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = t["data_offsets"]
            out[name] = np.frombuffer(data[8 + size + start : 8 + size + end], types[t["dtype"]]).reshape(t["shape"])
    return out


def inputs(model, ids):
    feed = {}
    for value in model.graph.input:
        if value.name == "input_ids":
            feed[value.name] = ids.astype(np.int64)
        elif value.name == "past_length":
            feed[value.name] = np.zeros(1, np.int64)
        else:
            feed[value.name] = np.zeros([d.dim_value for d in value.type.tensor_type.shape.dim], np.float32)
    return feed


def checker(path):
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def run_reference(path, feed):
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return dict(zip(session.output_names, session.run(None, feed)))


def run_openvino(path, feed):
    import onnx
    import onnx.inliner
    import openvino

    core = openvino.Core()
    # The default lets the CPU plugin compute in bfloat16 where the machine can.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = onnx.load(str(path), load_external_data=False)
    if model.functions:
        # Beside the graph, whose weights it shares.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".inlined") as inlined:
            inlined.write(onnx.inliner.inline_local_functions(model).SerializeToString())
            inlined.flush()
            compiled = core.compile_model(core.read_model(inlined.name), "CPU", settings)
    else:
        compiled = core.compile_model(str(path), "CPU", settings)
    results = compiled(feed)
    # A port has the names of all values that are the same tensor to OpenVINO.
    return {name: results[port] for port in compiled.outputs for name in port.get_names()}


def compare(model, results, truth):
    precision = next(p.value for p in model.metadata_props if p.key == "gptoss.precision")
    worst, where = 0.0, None
    for name, got in results.items():
        if name not in truth or (precision != "float32" and name != "logits"):
            continue
        want = truth[name]
        if got.shape[0] != want.shape[0]:
            want = want[-got.shape[0] :]
        if got.shape != want.shape or not np.isfinite(got).all():
            raise ValueError(f"{name} has shape {got.shape}, expected {want.shape}, or is not finite")
        difference = np.abs(got.astype(np.float64) - want)
        error = (difference.max() if precision == "float32" else difference.mean()) / np.abs(want).max()
        if error >= worst:
            worst, where = error, name
    if where is None or worst > TOLERANCE[precision]:
        raise ValueError(f"{where} is off by {worst:.1e} of its largest value")
    return f"{worst:.1e} of the largest value at worst ({where})"


def main():
    import onnx

    folder, task = pathlib.Path(sys.argv[1]), sys.argv[2]
    truth = safetensors(folder / "truth.safetensors")
    failures = ran = 0
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        operators = next(p.value for p in model.metadata_props if p.key == "gptoss.operators")
        if task != "checker" and operators != "portable":
            continue
        try:
            if task == "checker":
                checker(path)
                outcome = "ok"
            else:
                run = {"reference": run_reference, "openvino": run_openvino}[task]
                outcome = compare(model, run(path, inputs(model, truth["input_ids"])), truth)
                if task == "openvino" and model.functions:
                    outcome += ", after inlining"
            ran += 1
        except Exception as error:  # whatever an engine throws is the finding
            text = " ".join(str(error).split())
            outcome, failures = f"FAIL: {type(error).__name__}: {text[-300:]}", failures + 1
        print(f"{path.stem:60s} {outcome}")
    if ran == 0:
        sys.exit("nothing was checked")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

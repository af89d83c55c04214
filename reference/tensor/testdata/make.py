"""Makes the files in this folder with the real libraries (NumPy, ml_dtypes,
safetensors): python reference/tensor/testdata/make.py, in the environment that
`make oracles` sets up. All hold the same arrays."""

import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

here = pathlib.Path(__file__).parent
ramp = np.arange(6).reshape(2, 3) - 2
arrays = {
    "float64": ramp / 8.0,
    "float32": (ramp / 8.0).astype(np.float32),
    "float16": (ramp / 8.0).astype(np.float16),
    "bfloat16": (ramp / 8.0).astype(ml_dtypes.bfloat16),
    "int32": ramp.astype(np.int32),
    "int64": ramp.astype(np.int64),
    "uint8": (ramp + 2).astype(np.uint8),
    "fortran": np.asfortranarray((ramp / 8.0).astype(np.float32)),
    "cube": np.asfortranarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4)),
    "scalar": np.float32(-0.25),
    "empty": np.zeros((0, 3), np.float32),
}
np.savez(here / "stored.npz", **arrays)
np.savez_compressed(here / "deflated.npz", **arrays)
np.save(here / "float32.npy", arrays["float32"])
np.save(here / "fortran.npy", arrays["fortran"])
safetensors.torch.save_file(
    {n: torch.from_numpy(np.ascontiguousarray(a)) if n != "bfloat16" else torch.from_numpy(a.astype(np.float32)).bfloat16()
     for n, a in arrays.items() if n != "scalar"} | {"scalar": torch.tensor(-0.25)},
    here / "torch.safetensors", metadata={"format": "pt"})

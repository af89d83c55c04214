"""MXFP4 and bfloat16 rounding for training, and the bytes of a checkpoint.

A group is 32 values along the input dimension; value = code * 2^(scale - 127)
with the code from TABLE (OCP Microscaling Formats v1.0, and OpenAI's
checkpoint layout). Rounding in training is straight-through: the forward pass
sees the rounded weight, the gradient passes as if there were no rounding.
"""

import torch

GROUP = 32
TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway between neighbours of TABLE: a magnitude above MIDPOINTS[i] rounds to
# a code above i.
MIDPOINTS = tuple((a + b) / 2 for a, b in zip(TABLE, TABLE[1:]))


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes (uint8, the shape of weight) and scale exponents (float,
    [..., groups]) of the nearest MXFP4 values.

    The exponent puts the largest magnitude between 3.5 and 7, so that the
    largest code is 4 or 6: one of the two encodings of a block, always the
    same one.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    largest = groups.abs().amax(-1).clamp_min(2.0**-100)
    exponent = torch.floor(torch.log2(largest)) - 2
    exponent = exponent + (largest > 7 * torch.exp2(exponent))
    scaled = groups / torch.exp2(exponent)[..., None]
    bounds = torch.tensor(MIDPOINTS, dtype=weight.dtype)
    codes = torch.bucketize(scaled.abs(), bounds).to(torch.uint8)
    negative = (scaled < 0) & (codes > 0)
    codes = codes + 8 * negative.to(torch.uint8)
    return codes.reshape(weight.shape), exponent


def decode(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """The float32 values of codes and exponents as encode returns them."""
    table = torch.tensor(TABLE + tuple(-v for v in TABLE), dtype=torch.float32)
    groups = table[codes.long()].reshape(*exponent.shape, GROUP)
    return (groups * torch.exp2(exponent)[..., None]).reshape(codes.shape)


def pack(codes: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., rows, groups, 16] (low nibble first) and scales [..., rows,
    groups], both uint8, as they stand in a checkpoint. A block of zeros gets
    scale 0."""
    groups = codes.reshape(*exponent.shape, GROUP)
    blocks = groups[..., 0::2] | (groups[..., 1::2] << 4)
    scales = (exponent + 127).to(torch.uint8)
    scales = torch.where((groups & 7).amax(-1) == 0, torch.zeros_like(scales), scales)
    return blocks, scales


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values of a checkpoint's blocks and scales."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return decode(codes.flatten(-2), scales.float() - 127)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(context, weight):
        return decode(*encode(weight))

    @staticmethod
    def backward(context, gradient):
        return gradient


def mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """weight rounded to MXFP4, straight-through."""
    return _Round.apply(weight)


def bfloat16(weight: torch.Tensor) -> torch.Tensor:
    """weight rounded to bfloat16, straight-through."""
    return weight + (weight.detach().to(torch.bfloat16).float() - weight.detach())

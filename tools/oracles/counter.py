"""The counter-based generator of fixtures/counter.go, bit for bit.

value i of a tensor depends on (seed, name, i) alone. `python counter.py` prints
the words that the Go test compares, computed with Python's own big integers.
"""

import numpy as np

MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15


def _mix(x):
    """SplitMix64's finalizer, on numpy uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed, name):
    hashed = 0xCBF29CE484222325  # FNV-1a
    for byte in name.encode():
        hashed = ((hashed ^ byte) * 0x100000001B3) & MASK
    return _mix(np.array([seed ^ hashed], dtype=np.uint64))[0]


def words(seed, name, start, count):
    with np.errstate(over="ignore"):
        index = np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)
        return _mix(_key(seed, name) + index * np.uint64(STEP))


def uniform(seed, name, start, count):
    """Multiples of 2^-53 in [0, 1)."""
    return (words(seed, name, start, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed, name, start, count):
    """Mean 0, variance 1: the sum of the word's four 16-bit quarters, scaled."""
    w, quarter = words(seed, name, start, count), np.uint64(0xFFFF)
    total = sum((w >> np.uint64(16 * i)) & quarter for i in range(4))
    return (total.astype(np.float64) - 131070.0) / 37837.0


def _word_by_integers(seed, name, i):
    """The definition once more, without numpy."""

    def mix(x):
        x ^= x >> 30
        x = x * 0xBF58476D1CE4E5B9 & MASK
        x ^= x >> 27
        x = x * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    hashed = 0xCBF29CE484222325
    for byte in name.encode():
        hashed = (hashed ^ byte) * 0x100000001B3 & MASK
    return mix(mix(seed ^ hashed) + (i + 1) * STEP & MASK)


if __name__ == "__main__":
    for seed, name in [(0, ""), (1, "embedding.weight"), (2**64 - 1, "ß")]:
        values = [_word_by_integers(seed, name, i) for i in (0, 1, 10**12)]
        assert values[:2] == words(seed, name, 0, 2).tolist() and values[2] == words(seed, name, 10**12, 1)[0]
        print(f'{{{seed}, "{name}", [3]uint64{{' + ", ".join(f"{v:#018x}" for v in values) + "}},")

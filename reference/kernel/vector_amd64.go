package kernel

import (
	"math"

	"golang.org/x/sys/cpu"
)

// instructionSets lists those that this processor has, best first.
var instructionSets = available()

// chosen is the instruction set that products run on; nil is portable Go.
var chosen = best(instructionSets)

func best(sets []*instructionSet) *instructionSet {
	if len(sets) == 0 {
		return nil
	}
	return sets[0]
}

func available() (sets []*instructionSet) {
	if cpu.X86.HasAVX512F && cpu.X86.HasAVX512VL && cpu.X86.HasAVX2 && cpu.X86.HasFMA {
		sets = append(sets, &avx512)
	}
	if cpu.X86.HasAVX2 && cpu.X86.HasFMA {
		sets = append(sets, &avx2)
	}
	return sets
}

// scaledCodes holds the values of MXFP4's sixteen codes (E2M1: sign, two bits of
// exponent, one of fraction) under every scale (E8M0: 2^(scale-127)). What
// overflows is infinite; checkpoints that have it are refused.
//
//lint:ignore U1000 the assembly reads it
var scaledCodes = func() (table [256][16]float32) {
	for scale := range table {
		for code, magnitude := range []float64{0, 0.5, 1, 1.5, 2, 3, 4, 6} {
			v := float32(math.Ldexp(magnitude, scale-127))
			table[scale][code], table[scale][code+8] = v, -v
		}
	}
	return table
}()

var avx512 = instructionSet{
	name: "AVX-512",
	single: vectors[float32]{
		arrange: split, lanes: 16, reduce: reduce32AVX512,
		blocks: []blockKernel[float32]{
			{6, block32AVX512x1}, {6, block32AVX512x2}, {6, block32AVX512x3}, {6, block32AVX512x4},
		},
		mxfp4: streams[float32]{
			kernels: []streamKernel[float32]{
				{4, streamMXFP4AVX512x1}, {4, streamMXFP4AVX512x2}, {4, streamMXFP4AVX512x3}, {4, streamMXFP4AVX512x4},
				{3, streamMXFP4AVX512x5}, {3, streamMXFP4AVX512x6}, {3, streamMXFP4AVX512x7}, {3, streamMXFP4AVX512x8},
			},
			most: math.MaxInt, // 87 GFLOP/s and more from five tokens on, blocks 65 to 95
		},
		bf16: streams[float32]{
			kernels: []streamKernel[float32]{
				{4, streamBF16AVX512x1}, {4, streamBF16AVX512x2}, {4, streamBF16AVX512x3}, {4, streamBF16AVX512x4},
				{3, streamBF16AVX512x5}, {3, streamBF16AVX512x6}, {3, streamBF16AVX512x7}, {3, streamBF16AVX512x8},
			},
			most: math.MaxInt, // 100 GFLOP/s and more, blocks 55 to 95
		},
		decodeMXFP4: decodeMXFP4AVX512, decodeBF16: decodeBF16AVX512,
		innerProducts: innerProducts32AVX512, weightedSum: weightedSum32AVX512, blockBytes: 128, exp: exp32AVX512,
	},
	double: vectors[float64]{
		arrange: inOrder, lanes: 8, reduce: reduce64AVX512,
		blocks: []blockKernel[float64]{
			{4, block64AVX512x1}, {4, block64AVX512x2}, {4, block64AVX512x3}, {4, block64AVX512x4},
		},
		decodeMXFP4: decode64MXFP4AVX512, decodeBF16: decode64BF16AVX512,
		innerProducts: innerProducts64AVX512, weightedSum: weightedSum64AVX512, blockBytes: 128,
	},
}

var avx2 = instructionSet{
	name: "AVX2",
	single: vectors[float32]{
		arrange: split, lanes: 16, reduce: reduce32AVX2,
		blocks:      []blockKernel[float32]{{3, block32AVX2x1}, {3, block32AVX2x2}},
		mxfp4:       streams[float32]{[]streamKernel[float32]{{4, streamMXFP4AVX2x1}, {2, streamMXFP4AVX2x2}}, 4},
		bf16:        streams[float32]{[]streamKernel[float32]{{4, streamBF16AVX2x1}, {2, streamBF16AVX2x2}}, 12},
		decodeMXFP4: decodeMXFP4AVX2, decodeBF16: decodeBF16AVX2,
		innerProducts: innerProducts32AVX2, weightedSum: weightedSum32AVX2, blockBytes: 32, exp: exp32AVX2,
	},
	double: vectors[float64]{
		arrange: inOrder, lanes: 8, reduce: reduce64AVX2,
		blocks:        []blockKernel[float64]{{2, block64AVX2x1}, {2, block64AVX2x2}},
		innerProducts: innerProducts64AVX2, weightedSum: weightedSum64AVX2, blockBytes: 32,
	},
}

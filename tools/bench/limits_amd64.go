package main

import "golang.org/x/sys/cpu"

// available lists the instruction sets that this processor has.
func available() (sets []loops) {
	if cpu.X86.HasAVX512F {
		sets = append(sets, vectors("AVX-512", 16, multiplyAddAVX512, readAVX512, readAheadAVX512))
	}
	if cpu.X86.HasAVX2 && cpu.X86.HasFMA {
		sets = append(sets, vectors("AVX2", 8, multiplyAddAVX2, readAVX2, readAheadAVX2))
	}
	return sets
}

func vectors(name string, lanes int, multiplyAdd func(int, *float32), read ...func(*byte, int)) loops {
	const sums = 12 // in asm/main.go
	l := loops{
		name:  name,
		width: sums * lanes,
		multiplyAdd: func(turns int) {
			factors := [2]float32{0.5, 1}
			multiplyAdd(turns, &factors[0])
		},
	}
	for _, r := range read {
		l.read = append(l.read, func(buffer []byte) { r(&buffer[0], len(buffer)/512) })
	}
	return l
}

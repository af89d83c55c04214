# Full width: the tests that take minutes, and the reference beside every engine
# that is installed. BENCH_LAYERS=24 takes the deep checkpoint; BENCH_FLAGS goes to
# tools/bench/compare.py.
BENCH_LAYERS ?= 2
BENCH_PYTHON ?= $(firstword $(wildcard build/oracles/bin/python) python3)

.PHONY: twolayer
twolayer: onnxruntime ## Judge two layers at full width (3.3 GB in the cache)
	go test -count=1 -timeout 60m -tags twolayer -run '^TestTwoLayer$$' -v $(TESTFLAGS) ./conformance

.PHONY: full
full: onnxruntime ## Judge all 24 layers at full width (13.8 GB in the cache)
	go test -count=1 -timeout 120m -tags full -run '^TestFull$$' -v ./conformance

.PHONY: bench-compare
bench-compare: build ## Time the reference beside torch, transformers, llama.cpp and ONNX Runtime
	checkpoint=$$(build/gptoss synthesize --layers $(BENCH_LAYERS) --if-missing) && \
	$(BENCH_PYTHON) tools/bench/compare.py --checkpoint "$${checkpoint%% *}" $(BENCH_FLAGS)

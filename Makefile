# `make demo` runs the main job, `make test` the test-suite, `make docs` builds the site; all make and reuse a virtual
# environment. `make test-torch TORCH=2.9.1` runs the test-suite in one of its own, with that version of torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
TORCH ?= 2.9.1
PIN ?=

.PHONY: install demo check test test-torch lint docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PIN)
	touch $@

demo: install
	rm -rf $(OUT)
	$(BIN)/l2o train --preset demo --threads 1 --out $(OUT)
	$(BIN)/l2o export $(OUT)/rule.safetensors --to all --out $(OUT)/export
	$(BIN)/python examples/compare_formats.py $(OUT)/export --out $(OUT)/comparison.png

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What to run after every change; the rest is for `make test`.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -q \
	  -m "not (slow or ranks or browser or wrappers or conformance or cuda)"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-torch:
	$(MAKE) test VENV=.venv-torch-$(TORCH) PIN=torch==$(TORCH)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-torch-* runs site

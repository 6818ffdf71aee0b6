# `make demo` runs the main job, `make test` the test-suite; both make and reuse a virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: install demo test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
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

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

clean:
	rm -rf $(VENV) runs

# All targets run in a virtual environment, made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Spinning OpenMP threads slow each other down on few or busy cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: install demo demo-language test lint bench clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: install  ## compares TreeLoRA with plain LoRA and an Avalanche strategy, on embedded data
	$(BIN)/treelora compare

demo-language: install  ## a small language model learns six tasks, and routes prompts
	$(BIN)/python examples/demo_language.py

# One process per file: its tests share trained models.
test: install  ## runs the test suite on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## measures training speed against the baselines; rewrites docs/performance.md
	$(BIN)/python benchmarks/stream_speed.py --check --write docs/performance.md

clean:
	rm -rf $(VENV) build dist *.egg-info runs

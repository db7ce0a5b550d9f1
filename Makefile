# Everything runs in a virtual environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Threads that spin while they wait slow each other down where cores are few or busy.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: install demo test lint bench clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

demo: install  ## TreeLoRA beside plain LoRA and an Avalanche built-in, on embedded data
	$(BIN)/treelora compare

# A file stays in one process: its tests share what they have trained.
test: install  ## the whole test suite, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## how fast a stream is learned, beside the contenders; rewrites docs/performance.md
	$(BIN)/python benchmarks/stream_speed.py --check --write docs/performance.md

clean:
	rm -rf $(VENV) build dist *.egg-info runs

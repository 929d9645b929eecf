# `make demo` and `make test` need Python 3.11 or newer and nothing else; both keep to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint bench faults clean

demo: $(VENV)/.worker
	$(BIN)/pdtrim demo

test: $(VENV)/.test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90 --skip-covered --skip-empty

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.worker
	$(BIN)/python benchmarks/engine.py --streamed
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/search.py optimum --removed 1 2 3 4 5
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 64
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 64 --copies 2
	$(BIN)/python benchmarks/pair.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/kv_tokens.py
	$(BIN)/python benchmarks/objective.py
	$(BIN)/python benchmarks/peers.py --removed 3 4 5 --heal-tokens 131072

faults: $(VENV)/.test
	$(BIN)/python -m tests.faults.run --jobs 200 --faults 300 --seed 0

clean:
	rm -rf $(VENV) pdtrim-data .coverage*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.worker: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[worker]'
	@touch $@

$(VENV)/.test: $(VENV)/.worker
	$(PIP) --editable '.[worker,test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[worker,test,dev]'
	@touch $@

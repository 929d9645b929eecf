# `make demo` and `make test` need Python 3.11 or newer and nothing else; both keep to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test chart-test chart-docs docs lint bench bench-service faults fuzz schemathesis state-machine clean

demo: $(VENV)/.worker
	$(BIN)/pdtrim demo

test: $(VENV)/.test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 3 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90 --skip-covered --skip-empty

# Part of `make test`: the images' build files, the compose file, and the chart as Helm renders it.
chart-test: $(VENV)/.test
	$(BIN)/python -m pytest tests/chart

chart-docs: $(VENV)/.worker
	$(BIN)/python helm/document.py

# Into build/docs, which any web server serves.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.worker
	$(BIN)/python benchmarks/engine.py --streamed
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/search.py optimum --removed 1 2 3 4 5
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 128
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 64 --copies 2
	$(BIN)/python benchmarks/pair.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/kv_tokens.py
	$(BIN)/python benchmarks/objective.py
	$(BIN)/python benchmarks/peers.py --removed 3 4 5 --heal-tokens 131072

# Some eight minutes, five of which fill a database with a million jobs.
bench-service: $(VENV)/.test
	$(BIN)/python -m benchmarks.service

faults: $(VENV)/.test
	$(BIN)/python -m tests.faults.run --jobs 200 --faults 300 --seed 0

# Each target of tests/fuzz for so long; what it finds is kept in tests/fuzz/corpus, and fails the tests until it is mended.
FUZZ_SECONDS ?= 600
FUZZ_MEMORY_MB ?= 2048
FUZZ_TARGETS ?= safetensors_header job_spec
fuzz: $(VENV)/.fuzz
	for target in $(FUZZ_TARGETS); do $(BIN)/python -m tests.fuzz.run $$target $(FUZZ_SECONDS) $(FUZZ_MEMORY_MB) || exit 1; done

SCHEMATHESIS_REQUESTS ?= 20000
schemathesis: $(VENV)/.test
	$(BIN)/python -m tests.api_fuzz.run $(SCHEMATHESIS_REQUESTS)

STATE_MACHINE_EXAMPLES ?= 2000
state-machine: $(VENV)/.test
	STATE_MACHINE_EXAMPLES=$(STATE_MACHINE_EXAMPLES) $(BIN)/python -m pytest --timeout=0 tests/unit/service/db/test_lifecycle.py

clean:
	rm -rf $(VENV) pdtrim-data .coverage*

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.worker: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[worker]'
	@touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.test: $(VENV)/.worker
	$(PIP) --editable '.[worker,test,docs]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) --editable '.[worker,test,fuzz]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[worker,test,dev]'
	@touch $@

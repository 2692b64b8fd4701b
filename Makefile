# `make demo` and `make test` need nothing but git, make and Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG_DIR ?= runs
PORT ?= 6006
N ?= 500
SEED ?= 0
NAME ?= lost_in_bfloat16

.DEFAULT_GOAL := help
.PHONY: help integrations demo story tensorboard docs test quick conformance faults fuzz check bench gpu clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

# torch first and alone, with its pinned version: as one of many requirements, pip could choose a build with gigabytes of CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[examples,dev]'
	touch $@

# Separate, because the demo and most of the tests do not need them.
$(VENV)/integrations: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[integrations]'
	touch $@

integrations: $(VENV)/integrations  ## install Accelerate, transformers, Lightning and others, so that `make test` also runs their tests

demo: $(VENV)/installed  ## train a small float8 network on handwritten digits, and show what its weights did
	$(BIN)/python examples/digits_float8.py --log-dir $(LOG_DIR)/digits_float8/$$(date +%Y%m%d-%H%M%S)

story: $(VENV)/installed  ## run a story of the documents: NAME=lost_in_bfloat16, or another file of examples/stories
	$(BIN)/python examples/stories/$(NAME).py

tensorboard: $(VENV)/installed  ## open TensorBoard on runs/
	$(BIN)/tensorboard --logdir $(LOG_DIR) --port $(PORT)

# Separate, because only `make docs` needs them.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# Builds everything each time, so that removed pages disappear. A warning is an error: broken links are warnings.
docs: $(VENV)/docs  ## build the documents as a site, without network access: build/site/index.html
	rm -rf build/site build/doctrees
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html -c docs -d build/doctrees . build/site
	@echo "Open build/site/index.html"

# Two processes with one thread each: threads that share such small tensors mostly wait for each other. Whole files are
# distributed, in the order of tests/conftest.py: the fixtures of a file are set up once, and distributing thousands of
# single tests took 20 s.
test: $(VENV)/installed  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A file or two for each part: counting, quantizers, kernels, metrics, sinks, reports, the wrapper and the hooks, documents.
# At most 45 s of CPU time, since each of the two processes first imports torch.
QUICK := tracker groups integer kernels metrics sinks csv report_reading optimizer wrong_calls docs
quick: $(VENV)/installed  ## run every seventh test, some of each part, in less than 30 s
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

conformance: $(VENV)/installed  ## compare wrapped with bare for every input of PyTorch's own optimizer tests
	$(BIN)/python -m pytest -m conformance tests/test_conformance.py

faults: $(VENV)/installed  ## raise at every line of the library while a network trains, which takes 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m conformance tests/test_faults.py

fuzz: $(VENV)/installed  ## compare N=500 random trainings, bare and tracked, with brute force; SEED=0 is the first
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seed $(SEED) --count $(N)

# Needs an environment with torch for this accelerator, which no rule here installs: GPU_PYTHON= names its Python. The
# tests run without the package installed, and skip what the environment does not have.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:  ## on a machine with an accelerator, run its tests and measure the cost of tracking (install torch for it first)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/test_accelerator.py tests/test_launches.py \
		tests/test_triton_kernel.py tests/test_cuda_graphs.py -rs
	mkdir -p runs
	PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu.py --json runs/gpu.json

check: $(VENV)/installed  ## run ruff, mypy --strict, and the test of the table of allowed imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/installed  ## measure what tracking costs, in a few minutes: prints tables, writes runs/bench.json and runs/bench.svg
	mkdir -p runs
	$(BIN)/python benchmarks/step_cost.py --json runs/bench.json --chart runs/bench.svg

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache src/*.egg-info

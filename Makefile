# Two commands matter: `make demo` (set up, run the line once, say where everything is) and `make test` (set up, check all).
PYTHON ?= python3
# One process a core, one thread each; a file's tests stay together, since they share servers and models. A process that
# died is not started again, or the test that ended it would run, and end the next one, up to eight times.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart=0
VENV := .venv
BIN := $(VENV)/bin
# What torch brings along itself, so that the lock serves CPU and GPU builds of it alike.
TORCH_OWN := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

.DEFAULT_GOAL := help
.PHONY: help setup demo test check quick lint coverage faults bench docs lock clean

help: ## Says what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## Makes .venv with the locked packages

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Loraline needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". To do: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup ## Trains, evaluates, registers and exports one adapter; says where the results are
	$(BIN)/loraline run examples/zorb/pipeline.yaml

test: lint ## Runs all checks: lint, the quick tests with the share of branches that they must cover, the slow tests
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered
	$(PYTEST) -m whole --dist load --maxschedchunk=1
	$(PYTEST) -m "slow and not whole"

check: setup ## Runs the fast checks: lint and the quick tests, side by side
	$(MAKE) --jobs=2 lint quick

quick: setup
	$(PYTEST) -m "not slow"

lint: setup ## Checks format, style, types and the layers of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: setup ## Counts the branches that all tests reach together, which takes much longer
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=86

faults: setup ## Kills, fills disks, races and flips bytes by the hundred, and checks what must hold
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

bench: setup ## Measures what benchmarks/README.md reports
	$(BIN)/python -m benchmarks

docs: setup ## Checks that the commands and links in the documentation hold
	$(BIN)/python -m pytest tests/docs

lock: ## Locks the packages anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra photographs --extra optimisers --universal --python-version 3.11 --upgrade \
	  $(TORCH_OWN:%=--no-emit-package %) --generate-hashes --no-annotate --no-header --quiet --output-file requirements.lock

clean: ## Removes .venv and all caches (never .loraline)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

# Main targets: `make demo` (set up, run a pipeline, print the results) and `make test` (set up, run all checks).
PYTHON ?= python3
# Processes of one thread each. The tests of a file stay together, since they share servers and models; tests/measured.py
# sets the number of processes and the order. A crashed worker is not restarted: the same test would crash the next.
# A test that passes leaves no folder: tests/measured.py places folders in memory.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart=0 \
  -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1
# Tests start a hundred processes; each would compile the packages again if this were set.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
# Dependencies of torch. They are not locked, so the lock works with CPU and GPU builds.
TORCH_OWN := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

.DEFAULT_GOAL := help
.PHONY: help setup demo test suite check quick nightly mutants durations lint faults fuzz bench docs wheel lock clean

help: ## Lists the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## Creates .venv with the locked packages

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Loraline needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Fix: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup ## Trains, evaluates, registers and exports one adapter; prints where the results are
	$(BIN)/loraline run examples/zorb/pipeline.yaml

test: setup ## Runs all checks except those of nightly
	$(MAKE) --jobs=2 lint suite

suite: setup
	$(PYTEST) --durations=40

check: setup ## Runs lint and the tests that take less than a tenth of a second each
	$(MAKE) --jobs=2 lint quick

quick: setup
	$(PYTEST) -m "not slow"

nightly: lint ## Runs everything with branch coverage, new hypothesis examples and the full fault campaigns; takes hours
	$(PYTEST) --nightly --hypothesis-profile=nightly --durations=40 --cov --cov-report=term:skip-covered
	$(MAKE) faults

mutants: setup ## Makes small changes to central modules and counts those that the tests notice; installs mutmut
	$(BIN)/uv pip install --quiet --python $(BIN)/python mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.mutants

durations: setup ## Measures every test again and rewrites tests/durations.json
	$(PYTEST) --store-durations

lint: setup ## Checks format, style, types and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

faults: setup ## Runs the full fault campaigns: kills, full disks, races, flipped bytes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

SECONDS ?= 60
fuzz: setup ## Tries changed files, texts and rows on all readers for SECONDS=60, or COUNT=N of them; findings: build/fuzz
	$(BIN)/python -m tests.fuzz $(if $(COUNT),--count $(COUNT),--seconds $(SECONDS))

bench: setup ## Measures what benchmarks/README.md reports
	$(BIN)/python -m benchmarks

docs: setup ## Checks the documentation, executes the notebook and writes the API reference to build/api
	$(BIN)/python -m pytest tests/docs
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target build/docs-tools pdoc==16.0.0 nbclient==0.11.0 ipykernel==7.4.0
	PYTHONPATH=$(CURDIR)/build/docs-tools:$(CURDIR) $(BIN)/python -m tools.run_notebook examples/library.ipynb build/library.ipynb
	PYTHONPATH=$(CURDIR)/build/docs-tools:$(CURDIR) $(BIN)/python -m tools.run_notebook examples/generate.ipynb build/generate.ipynb
	PYTHONPATH=$(CURDIR)/build/docs-tools:$(CURDIR) $(BIN)/python -m tools.api_reference build/api

wheel: setup ## Builds the package, installs it in an empty environment, and runs a pipeline there; needs minutes
	rm -rf build/lib build/dist
	$(BIN)/uv build --quiet --out-dir build/dist
	tools/smoke_wheel.sh $(BIN)/uv build/dist/*.whl build/smoke

lock: ## Updates the lock of the packages from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra photographs --extra optimisers --universal --python-version 3.11 --upgrade \
	  $(TORCH_OWN:%=--no-emit-package %) --generate-hashes --no-annotate --no-header --quiet --output-file requirements.lock

clean: ## Removes .venv and all caches (never .loraline)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

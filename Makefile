# People and CI run the same commands; `make` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := $(VENV)/.model
CONSTRAINTS_VENV := .venv-constraints
ARGS ?=

.PHONY: help setup serve test test-unit test-slow test-gpu check format proto bench constraints clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) $(MODEL) ## install into .venv and fetch the default model; does nothing when up to date

serve: setup ## start the server; extra flags through ARGS='...'
	$(BIN)/twinpool serve $(ARGS)

test: setup ## all tests but the slow ones; pytest flags through ARGS='...'
	$(BIN)/python -m pytest $(ARGS)

test-unit: $(INSTALLED) ## unit tests only: no model, no Ray, no sockets
	$(BIN)/python -m pytest tests/unit $(ARGS)

test-slow: setup ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: setup ## the tests that need a CUDA GPU; each says why when it is skipped
	$(BIN)/python -m pytest -m gpu -rs tests/gpu $(ARGS)

check: $(INSTALLED) ## lint, format, types, import direction, fresh stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_import_direction.py tests/unit/test_stubs_fresh.py

format: $(INSTALLED) ## rewrite the source in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(INSTALLED) ## write the protobuf stubs again
	$(BIN)/python -m kvcache.transfer.generate

bench: setup ## load on a running server; flags through ARGS='...'
	$(BIN)/python -m benchmarks.serve $(ARGS)

# torch is named on the command line because a bare range would pull the newest build for CUDA.
constraints: ## write constraints.txt again, from the newest versions that setup.py allows
	rm -rf $(CONSTRAINTS_VENV)
	$(PYTHON) -m venv $(CONSTRAINTS_VENV)
	$(CONSTRAINTS_VENV)/bin/pip install --quiet $(TORCH) --editable '.[dev,rdma]'
	echo '# Versions tested together. Written by `make constraints`; do not edit.' > $(CONSTRAINTS_VENV)/constraints.txt
	$(CONSTRAINTS_VENV)/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> $(CONSTRAINTS_VENV)/constraints.txt
	mv $(CONSTRAINTS_VENV)/constraints.txt constraints.txt
	rm -rf $(CONSTRAINTS_VENV)

clean: ## remove caches and build output; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(CONSTRAINTS_VENV)
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): setup.py constraints.txt $(wildcard workers/native/*.cpp workers/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): some minutes, about 1.6 GB'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(MODEL): $(INSTALLED)
	$(BIN)/twinpool fetch
	touch $@

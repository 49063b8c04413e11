# `make` explains the targets. All of them set up .venv on their own; there is no other set-up.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Threads that wait without spinning: on a busy machine spinning costs several times the work.
export OMP_WAIT_POLICY ?= passive

# Machines with a GPU often have torch but no network: make gpu-check NOVENV=1 PYTHON=python3
# KIT names the folder that `make gpu-kit` made on a machine with a network, carried beside this one.
ifdef NOVENV
GPU_PYTHON := PYTHONPATH=.$(if $(KIT),:$(KIT)/site) $(PYTHON)
GPU_READY := $(if $(KIT),$(KIT)/.ready)
else
GPU_PYTHON := $(BIN)/python
GPU_READY := $(READY)
endif
ifdef KIT
export CIFAR10_DIR ?= $(KIT)/cifar10
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-oldest lint types docs dist bench gpu-kit gpu-check gpu clean

help: ## explain the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml
	@echo "setting up .venv (the first time this downloads several gigabytes, mostly torch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or later: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[zoo,dev]'
	@touch $@

quickstart: $(READY) ## train the airbench CNN with F-Muon on the embedded digits
	$(BIN)/python -m lit_fanions fit --config configs/quickstart.yaml

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2

test-slow: $(READY) ## run the tests that take longer
	$(BIN)/python -m pytest -n 2 -m slow

# Another environment, because versions differ: make test-oldest PYTHON=python3.10
.venv-oldest/.ready: pyproject.toml tests/oldest.txt
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/oldest.txt --editable '.[zoo,dev]'
	@touch $@

test-oldest: .venv-oldest/.ready ## run the tests with the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -n 2

lint: $(READY) ## check style, format and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(READY) ## check types
	$(BIN)/mypy

docs: $(READY) ## build the site of docs/ into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

dist: $(READY) ## build the wheel and the source distribution, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

bench: $(READY) ## time Lightning's loop against bare steps
	$(BIN)/python -m experiments.bench overhead --config configs/quickstart.yaml

gpu-kit: $(READY) ## pack wheels and CIFAR-10 into .kit, for a GPU machine without a network
	$(BIN)/python -m experiments.gpu.kit pack .kit

$(KIT)/.ready:
	PYTHONPATH=. $(PYTHON) -m experiments.gpu.kit unpack $(KIT)
	@touch $@

gpu-check: $(GPU_READY) ## run everything that has a CUDA path; skipped without a GPU
	$(GPU_PYTHON) tests/gpu_check.py

gpu: $(GPU_READY) ## measure everything that only a GPU can tell, in ten minutes, into docs/gpu
	$(GPU_PYTHON) -m experiments.gpu

clean: ## remove .venv and what tools leave behind; logs and data stay
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

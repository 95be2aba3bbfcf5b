# `make test` and `make demo` set themselves up: Python 3.11 or newer, a C++ compiler and a package index suffice.
# Names of Python that are tried, in this order; `make PYTHON=/path/to/python` takes that one.
PYTHONS := python3.11 python3.12 python3.13 python3 python
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# A worker for each core, but two at most: each loads torch, and some start a server.
WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); [ $$cores -lt 2 ] && echo $$cores || echo 2)
# Further arguments of pytest, such as a folder or --durations=40.
TESTS ?=
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile $(TESTS)

.PHONY: help setup test test-slow test-all test-gpu test-failures lint types check format demo ui up down status
.DEFAULT_GOAL := help

help:
	@echo "make demo        the whole pipeline on the embedded teacher"
	@echo "make test        the fast tests"
	@echo "make test-slow   the others: compilers, launchers, browsers, servers"
	@echo "make test-all    both"
	@echo "make test-gpu    what needs a GPU: CUDA graphs, block-sparse attention, training in bf16"
	@echo "make test-failures  kills, full disks, damaged files, lost servers; writes the table in docs/operations.md"
	@echo "make check       format, lint, types, fast tests"
	@echo "make format      format the code, and mend what the linter can"
	@echo "make ui          the runs in MLflow, on http://127.0.0.1:5000"
	@echo "make up          servers, work pools and workers on this machine, with the settings in .env"
	@echo "make status      what of them runs, and where"
	@echo "make down        stop them"
	@echo "make setup       the environment in $(VENV), which each of the above makes first if need be"

# torch first and by name: otherwise other packages pull a build with several GB of GPU libraries.
$(READY): pyproject.toml constraints.txt
	@$(FIND_PYTHON); \
	echo "environment: $(VENV), with $$($$python --version) ($$(command -v $$python))"; \
	made=$$($$python -m venv $(VENV) 2>&1) || { \
	  echo "error: $$python cannot make a virtual environment: install its venv and ensurepip" \
	    "(on Debian and Ubuntu the package python3-venv), or name another with make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@echo "environment: torch (a few hundred MB; a minute or more)"
	@$(PIP) install --constraint constraints.txt torch
	@echo "environment: dparallel and what else it needs (a few minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

# Sets the shell's $python to the first that is new enough, or ends with what to do.
define FIND_PYTHON
new='import sys; sys.exit(sys.version_info < (3, 11))'; python=''; \
for name in $(or $(PYTHON),$(PYTHONS)); do \
  if "$$name" -c "$$new" 2>/dev/null; then python="$$name"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "error: no Python of at least 3.11 (tried $(or $(PYTHON),$(PYTHONS))):" \
    "install one, or name it with make PYTHON=/path/to/python" >&2; \
  exit 1; \
fi
endef

setup: $(READY)

test: $(READY)
	$(PYTEST) -m 'not slow'

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: $(READY)
	$(PYTEST)

test-gpu: $(READY)
	$(PYTEST) -m gpu

# One after another: a case measures how a run ends.
test-failures: $(READY)
	WRITE_FAILURES=1 $(BIN)/pytest -m failures $(TESTS) tests/failures

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .

types: $(READY)
	$(BIN)/mypy

check: lint types test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY)
	$(BIN)/python -m flows.distill --config configs/tiny.yaml

ui: $(READY)
	@$(BIN)/python -m tasks.tracking ui

up: $(READY)
	@$(BIN)/python -m deploy.local up

status: $(READY)
	@$(BIN)/python -m deploy.local status

down: $(READY)
	@$(BIN)/python -m deploy.local down

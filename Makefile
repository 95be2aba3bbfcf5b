# `make test` and `make demo` set themselves up: Python 3.11, a C++ compiler and a package index suffice.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup test lint types check format demo ui
.DEFAULT_GOAL := help

help:
	@echo "make test    the tests (10 to 15 minutes on 2 busy cores)"
	@echo "make demo    the whole pipeline on the embedded teacher (6 to 8 minutes on 2 cores)"
	@echo "make check   format, lint, types, tests"
	@echo "make ui      the MLflow UI on http://127.0.0.1:5000"

# torch first and by name: otherwise other packages pull a build with several GB of GPU libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

setup: $(READY)

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY)
	$(BIN)/python -m flows.distill --config configs/tiny.yaml

ui: $(READY)
	$(BIN)/mlflow ui --backend-store-uri $(or $(filter-out http%,$(MLFLOW_TRACKING_URI)),sqlite:///mlflow.db) --host 127.0.0.1 --port 5000

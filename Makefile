# `make demo` and `make test` do their whole set-up on a fresh machine: a .venv, the package, everything pinned.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.labeltune-ready
DEMO ?= en

.PHONY: setup demo test torture lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

# The whole job on two CPU cores. DEMO=zh runs the Chinese rows on pocket-zh, after you accept the Gemma terms:
# it asks, or takes ACCEPT_LICENSE=gemma for an answer.
demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO) $(if $(ACCEPT_LICENSE),--accept-license=$(ACCEPT_LICENSE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests stay together; every process computes in one thread.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Kills, faults, hostile input and memory, for about half an hour; docs/reliability.md has the last full run's table.
# A part alone, or a tenth of everything: make torture TORTURE="training_kills --scale 0.1"
# Fuzzer and auditor are extras that not every machine can have; the parts that need them say so where they are missing.
torture: $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[torture]"
	$(BIN)/python -m torture $(TORTURE)

clean:
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache

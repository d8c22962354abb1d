# make demo | test | test-all | lint. The first one to run makes .venv; a stamp inside says what it holds.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
export OMP_NUM_THREADS ?= 2
# threads that wait, sleep: where others use the cores too, spinning ones slow training down a hundredfold
export OMP_WAIT_POLICY ?= passive

# a process that may not keep what it compiled of torch takes twice as long to start
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
USE := .venv/.installed
DEV := .venv/.installed-dev

.PHONY: demo test test-all lint

demo: $(USE)
	rm -rf runs/demo runs/demo.checkpoints
	$(BIN)/tersor run recipes/digits.yaml --out runs/demo

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: $(DEV)
	$(BIN)/python -m pytest

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

$(BIN)/python:
	$(PYTHON) -m venv .venv

# dev holds all that demo needs, so its stamp is both
$(DEV): pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $(USE) $@

$(USE): pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[openvino]'
	touch $@

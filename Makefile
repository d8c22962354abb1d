# make demo | test | test-all | test-lowest | wheel | audit | lint | docs. The first target creates .venv; a stamp file in it records what is installed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
export OMP_NUM_THREADS ?= 2
# waiting threads sleep: spinning threads slow training down a hundredfold if other processes use the same cores
export OMP_WAIT_POLICY ?= passive

# without cached bytecode of torch, a process takes twice as long to start
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
USE := .venv/.installed
DEV := .venv/.installed-dev

LOWEST := .venv-lowest
WHEEL := .venv-wheel
SUPPLY := .venv-supply
UV := $(SUPPLY)/bin/uv
# the tests of a file share fixtures, so they stay in one worker; tests/conftest.py starts the longest files first
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
QUICK := $(PYTEST) -m 'not slow'

.PHONY: demo test test-all test-lowest wheel audit lint docs

demo: $(USE)
	rm -rf runs/demo runs/demo-original
	$(BIN)/python examples/train_digits.py runs/demo-original
	$(BIN)/tersor compress resnet32 --weights runs/demo-original/weights.safetensors --data digits --max-drop 1 \
		--time 75s --out runs/demo

test: $(DEV)
	$(BIN)/python $(QUICK)

test-all: $(DEV)
	$(INSTALL) -e '.[fuzz,ray]'
	$(BIN)/python $(PYTEST)
	$(MAKE) test-lowest wheel

# run the quick tests with the oldest releases that pyproject.toml allows
test-lowest: $(SUPPLY)/.installed
	$(UV) venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	$(LOWEST)/bin/python $(QUICK)

# build the wheel, test it in an empty environment from another folder, and write a bill of materials
wheel: $(SUPPLY)/.installed
	rm -rf dist build
	$(UV) build --quiet --wheel --out-dir dist --python $(BIN)/python
	$(UV) venv --quiet --clear --python $(BIN)/python $(WHEEL)
	$(UV) pip install --quiet --python $(WHEEL)/bin/python dist/*.whl
	cd $(WHEEL) && env -u PYTHONPATH bin/python -P ../tests/wheel_smoke.py
	$(SUPPLY)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
		--output-reproducible --output-file dist/tersor.cdx.json $(WHEEL)/bin/python

# list known vulnerabilities of the installed packages; fails without access to the database on the internet
audit: $(DEV) $(SUPPLY)/.installed
	$(UV) pip freeze --quiet --exclude-editable --python $(BIN)/python > $(SUPPLY)/installed.txt
	$(SUPPLY)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(SUPPLY)/installed.txt

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

# build the site into site/; it works as files or on a server, and loads nothing from other sites
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src:pages $(BIN)/mkdocs build --quiet --clean

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(SUPPLY)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9' 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	touch $@

# dev includes everything that demo needs, so it sets both stamps
$(DEV): pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $(USE) $@

$(USE): pyproject.toml | $(BIN)/python
	$(INSTALL) -e '.[openvino]'
	touch $@

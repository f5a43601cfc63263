# make demo        install and run the quickstart: about five minutes on two CPU cores
# make test        linters, type checks, import contract, documentation and the test suite
# make test-slow   the tests that take more than 20 seconds each
# make test-gpu    the tests that need a GPU, in under three minutes; skipped where there is none
# make docs        the documentation, as build/docs/index.html
# make package     wheel and source distribution, in dist/
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-slow test-gpu lint docs package clean

demo: .venv/.demo
	$(BIN)/difftune quickstart

test: .venv/.dev
	$(MAKE) --jobs=2 lint docs
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.dev
	$(BIN)/pytest -m slow

test-gpu: .venv/.dev
	$(BIN)/pytest -m gpu -rs tests

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_difftune benchmarks pretraining
	$(BIN)/lint-imports

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

package: .venv/.dev
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[demo,control]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[dev]'
	touch $@ .venv/.demo

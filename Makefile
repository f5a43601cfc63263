# make demo   install and run the quickstart
# make test   linters, type checks, import contract and the test suite
# make test-slow   the tests that take more than 20 seconds each
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0]) if not (3, 11) <= sys.version_info[:2] <= (3, 13) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRA)]'
	echo '$(EXTRA)' > $@

# The demo needs little; the tests need the tools as well, and install them on top where the demo came first.
demo: EXTRA := demo
demo: .venv/.installed
	$(BIN)/difftune quickstart

test test-slow lint: EXTRA := dev
.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lightning_difftune
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest

test-slow: .venv/.dev
	$(BIN)/pytest -m slow

clean:
	rm -rf .venv runs build dist *.egg-info

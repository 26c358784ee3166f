# Needs python3 (3.11 to 3.13) with pip and venv; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
DOCS_INSTALLED := .venv/docs-installed

.DEFAULT_GOAL := help
.PHONY: help install wheel quickstart test test-all test-oldest test-newest soak lint types check format docs docs-serve audit

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(INSTALLED)  ## install the package and what tests need into .venv

wheel:  ## build a wheel in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

quickstart: $(INSTALLED)  ## train a tiny model on made-up arithmetic and print the table before/after
	$(BIN)/sft-lightning prepare quickstart --output data/quickstart
	$(BIN)/sft-lightning fit --config configs/quickstart.yaml --overwrite

test: $(INSTALLED)  ## run the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(INSTALLED)  ## run the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

test-oldest: .venv/oldest/installed  ## run the fast tests on the lowest versions that pyproject.toml allows
	.venv/oldest/bin/python -m pytest -m "not slow and not gpu"

test-newest:  ## run the fast tests on the newest versions that pip finds
	test -x .venv/newest/bin/pip || $(PYTHON) -m venv .venv/newest
	.venv/newest/bin/python -m pip install --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv/newest/bin/python -m pytest -m "not slow and not gpu"

soak: $(INSTALLED)  ## kill 300 runs at random and compare what comes of them: about an hour
	SFT_SOAK="260 30 10" $(BIN)/python -m pytest -s tests/test_soak.py

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

check: lint types test  ## everything that CI runs

docs: $(DOCS_INSTALLED)  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(DOCS_INSTALLED)  ## show the documentation in a browser, rebuilt as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --watch sft_lightning

format: $(INSTALLED)  ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit:  ## look up known vulnerabilities of the pinned dependencies; needs the network
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install 'pip-audit==2.10.1'; }
	.venv/audit/bin/python .ci/audit.py

# Touched last, so that an installation that broke off is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	@touch $@

.venv/oldest/installed: pyproject.toml .ci/lowest.py
	test -x .venv/oldest/bin/pip || $(PYTHON) -m venv .venv/oldest
	.venv/oldest/bin/python .ci/lowest.py > .venv/oldest/lowest.txt
	.venv/oldest/bin/python -m pip install --constraint .venv/oldest/lowest.txt --editable '.[dev]'
	@touch $@

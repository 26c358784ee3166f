# Needs python3 (3.11 to 3.13) with pip and venv; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all soak lint types check format audit

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

quickstart: $(INSTALLED)  ## train a tiny model on made-up arithmetic and print the table before/after
	$(BIN)/sft-lightning prepare quickstart --output data/quickstart
	$(BIN)/sft-lightning fit --config configs/quickstart.yaml --overwrite

test: $(INSTALLED)  ## run the fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(INSTALLED)  ## run the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

soak: $(INSTALLED)  ## kill 220 runs at random and compare what comes of them: up to half an hour
	SFT_SOAK="200 20" $(BIN)/python -m pytest -s tests/test_soak.py

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## check types
	$(BIN)/mypy

check: lint types test  ## everything that CI runs

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

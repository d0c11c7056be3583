# Two commands: `make book` and `make test`. Each makes its environment first, and does only what changed.
PYTHON  ?= python3
SUBJECT ?= smollm2
BIN     := .venv/bin
LIB     := $(BIN)/python -m lib

.PHONY: help book test smoke check lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

book: .venv/ready  ## execute every chapter on SUBJECT (default smollm2) and build _build/html
	$(LIB) run --subject $(SUBJECT)
	$(LIB) dashboard --subject $(SUBJECT)
	$(LIB) build --subject $(SUBJECT)

test: .venv/ready  ## lint, types and tests, the real model's included
	$(BIN)/ruff check lib tests data
	$(BIN)/mypy
	$(BIN)/python -m pytest

smoke: .venv/ready  ## execute every chapter on the small planted model, and check its numbers
	$(LIB) run --subject organism
	$(LIB) check --subject organism

check: .venv/ready  ## compare the last run on SUBJECT with data/expected
	$(LIB) check --subject $(SUBJECT)

clean:  ## delete what was built (the environment and the fetched models stay)
	rm -rf _build

.venv/ready: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

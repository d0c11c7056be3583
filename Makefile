# Two commands: `make book` and `make test`. Each makes its environment first, and does only what changed.
PYTHON ?= python3
MODEL  ?= smollm2
BIN    := .venv/bin
LIB    := $(BIN)/python -m lib
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# uv takes a tenth of pip's time; where it cannot (a registry that only pip is told of), pip does it.
GET     = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) || $(PIP) $(1)

# Each module is compiled once, when it is first read, whatever a shell says: a book is some forty processes.
unexport PYTHONDONTWRITEBYTECODE

ifdef SUBJECT
$(error SUBJECT= is called MODEL= now: make $(MAKECMDGOALS) MODEL=$(SUBJECT))
endif

.PHONY: help bench book record relations test slow smoke check pages pdf colab snapshot links clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | column -t -s '|'

book: .venv/ready  ## execute every chapter on MODEL (default smollm2) and build _build/html
	@$(LIB) book --model $(MODEL)

# Files in their order: left to itself, xdist begins with those of many tests, and ends alone on the longest.
test: .venv/developer  ## lint, types and tests, the real model's included
	$(BIN)/ruff check lib tests data
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: .venv/developer  ## the tests that wait long: what is killed and begins again, is built twice, or is a whole dashboard
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

record: .venv/ready  ## do every sweep of MODEL anew and write data/record (an hour for smollm2)
	$(LIB) record --model $(MODEL)

# Of each relation: its file in data/facts, and the wording in question.
relations: .venv/ready  ## chapter 10 on three relations of MODEL, kept in data/record (minutes each)
	@set -e; mkdir -p data/record/$(MODEL)/relations; \
	for one in "languages:{}'s official language is" "currencies:{}'s currency is the" "continents:{}'s continent is"; do \
	  for pathway in sink_kv v_only; do \
	    $(LIB) run 10 --model $(MODEL) -p facts_file="$${one%%:*}" -p template="$${one#*:}" -p pathway=$$pathway; \
	    cp _build/results/$(MODEL)/10_your_model.json data/record/$(MODEL)/relations/$${one%%:*}-$$pathway.json; \
	  done; done

smoke: .venv/ready  ## execute every chapter on the small planted model, and the regression test of its numbers
	$(LIB) run --model organism
	$(LIB) check --model organism

check: .venv/ready  ## regression test: does the last run on MODEL still give what an earlier one gave (data/expected)
	$(LIB) check --model $(MODEL)

pages: .venv/developer  ## look at every built page in a browser without network: scripts, pictures, links, accessibility
	$(BIN)/python -m pytest tests/pages

pdf: .venv/developer  ## print the built book of MODEL into _build/book.pdf
	$(LIB) pdf --model $(MODEL)

colab: .venv/ready  ## execute each chapter by itself as Colab would, in a new environment
	PYTHONPATH=. $(BIN)/python tests/simulate_colab.py

snapshot: .venv/developer book  ## one archive of the run on MODEL, to deposit, with its checksum beside it
	$(LIB) pdf --model $(MODEL)
	$(LIB) snapshot --model $(MODEL)

links: .venv/ready  ## check every link that the built book follows to the outside (needs the network)
	rm -rf _build/links && mkdir -p _build/links
	cp -r book _config.yml _toc.yml _build/links
	cp _build/executed/$(MODEL)/*.ipynb _build/html/_sources/book/index.md _build/html/_sources/book/reproduction.md _build/links/book
	$(BIN)/jupyter-book build _build/links --builder linkcheck

bench: .venv/ready  ## speed of the book on MODEL beside TransformerLens, Captum, PyTorch and peft: a table, and _build/bench.json
	$(BIN)/python -m tests.bench --model $(MODEL)

clean:  ## delete what was built (the environment, fetched models and shared runs stay)
	rm -rf _build

.venv/ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) --no-compile --progress-bar on torch==$$(sed -n 's/^torch==//p' constraints.txt)
	-$(PIP) uv -c constraints.txt
	$(call GET,-r requirements.txt -c constraints.txt)
	$(call GET,--no-deps --editable .)
	@touch $@

.venv/developer: .venv/ready requirements-dev.txt
	$(call GET,-r requirements-dev.txt -c constraints.txt)
	@touch $@

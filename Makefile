# make demo       the whole of it on rendered landmarks, in minutes (creates .venv on the first call)
# make test       everything a push must pass, from a bare machine (creates .venv on the first call)
# make test-slow  the long tests
# make lint       style and types
# make install    the environment alone; EXTRAS=gpu,offline,tune,dev for FAISS on a GPU

PYTHON ?= python3
EXTRAS ?= cpu,offline,tune,slurm,serve,download,export,plots,tensorboard,vectordb,dev
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-$(EXTRAS)
# One process per core, one thread each: small networks gain nothing from more.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: install demo test test-slow lint
install: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	rm -f .venv/.installed-*
	touch $@

demo: install
	$(BIN)/python scripts/quickstart.py

test: install
	$(PYTEST) -m 'not slow'

test-slow: install
	$(PYTEST) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

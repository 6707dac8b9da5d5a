# Two commands do all the set-up: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON_FOUND := $(shell command -v $(PYTHON) || command -v python3)
# Where this is set a daemon's two hundred modules are compiled at each of its thousands of starts in the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check types style quick bench bench-load bench-answers soak test-faults setup docs clean

$(STAMP): pyproject.toml client/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON_FOUND) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e '.[dev,torch]'
	touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)  ## train, crash, resume: the whole story in two minutes
	$(BIN)/python demo/run.py

check: $(STAMP)  ## lint, types, layers: mypy on one core, the others on another
	$(MAKE) --no-print-directory -j 2 -O types style

types: $(STAMP)
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/flake8 $$(grep -rlE --include='*.py' 'async |await |anyio' ckptd client demo)  # the others have nothing to cancel
	$(BIN)/lint-imports --no-cache

test: check  ## everything that must hold on every commit, under ten minutes on two cores
	$(BIN)/python -m pytest -n 4 --dist loadgroup -m "not faults"

quick: $(STAMP)  ## the fast loop
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not faults" tests/unit tests/search

test-faults: $(STAMP)  ## the long form of the crash suites
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "faults or teeth"

bench: $(STAMP)  ## ckptd beside its peers; writes docs/benchmarks.md
	$(BIN)/python -m tests.bench --out docs/benchmarks.md

bench-load: $(STAMP)  ## the load targets beside what this machine does; LOAD="--out PAGE" writes one
	$(BIN)/python -m tests.bench_load $(LOAD)

bench-answers: $(STAMP)  ## what answers from memory are worth, beside reading each time
	$(BIN)/python -m tests.bench_load.answering

# Memory is judged in the second hour: until then caches and gaps fill.
SOAK_MIN ?= 122
soak: $(STAMP)  ## trainers, writers, readers and random faults; SOAK_MIN minutes, SOAK="--seed N" repeats a schedule
	$(BIN)/python -m tests.soak --minutes $(SOAK_MIN) $(SOAK)

docs: $(STAMP)  ## regenerate the references that tests compare
	$(BIN)/python -m ckptd.origins reference example
	$(BIN)/python -m ckptd.cli.reference
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .demo .bench .soak .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

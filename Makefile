# Every target installs what it needs into VENV first; once that is there it costs a second.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DS_BUILD_OPS := 0

.PHONY: install demo test test-slow lint bench clean

install: $(STAMP)

# Torch comes first and by its exact version: a range would let pip look for another build.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)" setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/glmae demo

# Two processes, each with whole files of tests: what starts a Ray waits for half of its time. Files
# stay in their order, or each would start its folder's Ray anew; a thread each, or they wait for cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install
	$(BIN)/pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	for script in $$(cd benchmarks && ls *.py 2>/dev/null | grep -v '^_' | sed 's/\.py$$//'); do \
	  $(BIN)/python -m benchmarks.$$script --quick --out benchmarks/results/$$script.json || exit 1; \
	done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis glmae-demo

# Two commands are all a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test environment lint clean

environment: $(VENV)/.ready

# Remade when the package's own requirements or its C code change.
$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard src/unlabeled/*/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: environment
	$(BIN)/unlabeled demo

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests compute on one thread each; a file's tests stay together, since they share what is costly to make.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

clean:
	rm -rf $(VENV) build src/*.egg-info src/unlabeled/*/*.so

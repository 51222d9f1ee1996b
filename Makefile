# Everything sets itself up: a virtual environment in .venv, with tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled modules are kept whatever the environment says: without, each process compiles them anew.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist loadfile
# Tests marked `threads` leave threads behind, with which a process cannot be forked into ranks: they
# run apart.

.PHONY: demo demo-video test test-slow lint format setup clean

demo: $(STAMP)  ## teacher, few-step students, report: runs/demo/report.html
	$(BIN)/fewstep demo

demo-video: $(STAMP)  ## the same with videos, LCM and MCM: runs/demo_video/report.html
	$(BIN)/fewstep demo moving_digits

test: $(STAMP) lint  ## lint, types, import directions, tests
	$(PYTEST) -m "not slow and not threads" --durations=25
	$(PYTEST) -m "not slow and threads"

test-slow: $(STAMP)  ## end-to-end checks that take minutes
	$(PYTEST) -m "slow and not threads" --durations=20 $(OPTIONS)
	$(PYTEST) -m "slow and threads" $(OPTIONS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fewstep needs Python 3.11 or newer; set PYTHON=/path/to/it."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --constraint constraints.txt --editable . --group dev
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

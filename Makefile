# Every target sets up what it needs: a virtual environment with the pinned versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
# the Python of test-gpu, which may be the machine's own: nothing is installed, so that it keeps its torch
GPU_PYTHON ?= $(PY)
INSTALLED := $(VENV)/.installed
LM_EVAL_VENV := .venv-lm-eval

.PHONY: help train test test-slow test-gpu test-faults system-packages test-lm-eval lint format docs

help:
	@echo "make train         set up .venv, then train the default model (a few minutes on two CPU cores)"
	@echo "make test          set up .venv, then run the linter, the type checker and the fast tests"
	@echo "make test-slow     set up .venv, install Debian's postgresql and chromium if missing, then run the slow tests"
	@echo "make test-gpu      run the tests of one CUDA GPU (4 minutes); GPU_PYTHON=python3 takes the machine's own torch"
	@echo "make test-faults   kill real runs at every awkward moment and compare them with an unbroken one (half an hour)"
	@echo "make test-lm-eval  set up an environment with lm-evaluation-harness, then run the tests of its adapter"
	@echo "make lint          run ruff and mypy"
	@echo "make format        let ruff rewrite the code"
	@echo "make docs          build the guides and the API pages into build/docs (a warning is an error)"

train: $(INSTALLED)
	$(PY) -m lightning_moe fit

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-slow: $(INSTALLED) system-packages
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m slow

# The slow tests start a real database server and look at pages in a real browser.
system-packages:
	@sh .ci/system-packages

# Without the environment of the other targets: its torch may be one without CUDA.
test-gpu:
	OMP_NUM_THREADS=1 PYTHONPATH=.:$$PYTHONPATH $(GPU_PYTHON) -m pytest -m gpu tests/gpu

test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -s -m faults tests/faults

test-lm-eval: $(LM_EVAL_VENV)/.installed
	OMP_NUM_THREADS=1 $(LM_EVAL_VENV)/bin/python -m pytest -m lm_eval tests/evaluation

lint: $(INSTALLED)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -q -W --keep-going docs build/docs

$(PY):
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	@echo "Installing the pinned versions into $(VENV) …"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(LM_EVAL_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LM_EVAL_VENV)
	$(LM_EVAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,lm-eval]'
	@touch $@

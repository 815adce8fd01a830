# Every target sets up what it needs: a virtual environment with the pinned versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
# the Python of test-gpu, which may be the machine's own: nothing is installed, so that it keeps its torch
GPU_PYTHON ?= $(PY)
INSTALLED := $(VENV)/.installed
LM_EVAL_VENV := .venv-lm-eval
# the oldest torch that pyproject.toml promises, and the Python of the environments for test-oldest and test-newest
OLDEST_TORCH = $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
PYTHON_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: help train test test-oldest test-newest test-slow test-gpu test-faults system-packages test-lm-eval lint format docs

help:
	@echo "make train         set up .venv, then train the default model (a few minutes on two CPU cores)"
	@echo "make test          set up .venv, then run the linter, the type checker and the fast tests"
	@echo "make test-oldest   run the fast tests with the oldest promised torch; PYTHON=python3.12 chooses the Python"
	@echo "make test-newest   run the fast tests with the newest torch; PYTHON=python3.12 chooses the Python"
	@echo "make test-slow     set up .venv, install Debian's postgresql and chromium if missing, then run the slow tests"
	@echo "make test-gpu      run the tests of one CUDA GPU; GPU_PYTHON=python3 takes the machine's own torch"
	@echo "make test-faults   kill real runs at every awkward moment and compare them with an unbroken one (half an hour)"
	@echo "make test-lm-eval  set up an environment with lm-evaluation-harness, then run the tests of its adapter"
	@echo "make lint          run ruff and mypy"
	@echo "make format        let ruff rewrite the code"
	@echo "make docs          build the guides and the API pages into build/docs (a warning is an error)"

train: $(INSTALLED)
	$(PY) -m lightning_moe fit

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# Both need PYTHON, which may be 3.11 to 3.13. Each pair of a torch and a Python has an environment of its own, with the
# other packages of constraints.txt.
test-oldest: TORCH = torch==$(OLDEST_TORCH)
test-newest: TORCH = torch
test-oldest test-newest: test-%:
	@$(MAKE) --no-print-directory .venv-$*-$(PYTHON_VERSION)/.installed TORCH='$(TORCH)'
	OMP_NUM_THREADS=1 .venv-$*-$(PYTHON_VERSION)/bin/python -m pytest -n 2

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

# Without the lines of torch and of the Triton that belongs to it: `newest` asks the package index for its newest one each time the files here change.
.venv-oldest-%/.installed .venv-newest-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(torch|triton)==' constraints.txt > $(@D)/constraints.txt
	@echo "Installing $(TORCH) and the other pinned versions into $(@D) …"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(@D)/constraints.txt '$(TORCH)' -e '.[dev]'
	@touch $@

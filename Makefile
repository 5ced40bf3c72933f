# `make demo` and `make test` set up .venv by themselves, also when the other has not run.
#
#   PYTHON=python3.12       the interpreter of a new .venv (3.10 or newer)
#   PIP_ARGS="..."          handed to pip, such as the index of CPU-only torch wheels
#   STAGE="a b" WHEELS=dir  these stages of `make gpu`; a folder of wheels to install before them
#   RESULTS=dir WORK=dir    where its results go, and caches and wheels; DRY=1 tries it on a CPU
#   ARGS="..."              handed to the command: make demo ARGS="--forget animal-bird",
#                           make gpu ARGS="--total 540" for what fits into nine minutes

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
STAGE ?=
WHEELS ?=
RESULTS ?=
WORK ?=
DRY ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
APT := on Debian or Ubuntu: apt install git make python3-venv

.DEFAULT_GOAL := help
.PHONY: help demo docs gpu gpu-wheels test test-all test-scale quick everything lint style types format clean installed venv

help:
	@echo 'make demo     erase a concept from the small CLIP that ships with fasterase, show the result'
	@echo 'make test     lint, format check, type check and the quick tests: 5 minutes on 2 cores'
	@echo 'make test-all  those, and the slow tests: processes, interpreter, compilers, docs'
	@echo 'make test-scale  every stage, size and fault on several processes: 20 minutes'
	@echo 'make lint     the checks without the tests'
	@echo 'make docs     build the site into site/'
	@echo 'make gpu      on a machine with a GPU: its tests, checks and benchmarks, in stages'
	@echo 'make gpu-wheels  fetch packages that such a machine may lack'
	@echo 'make format   put the code into its standard form'
	@echo 'make clean    remove .venv and everything built'
	@echo
	@sed -n 's/^#   //p' Makefile

# By a call of its own, since several targets of one call may need different extras.
install = @$(MAKE) --no-print-directory installed EXTRAS=$(1)
DEVELOPING := hf,eval,demo,dev
demo:
	$(call install,demo)
	$(BIN)/python -m fasterase demo $(ARGS)

# A file at a time on each core; tests are too small to gain from a second thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 \
  --dist loadfile $(ARGS)
# Checking types takes a minute of one core where there is no cache: the tests run beside it.
test: style
	@$(MAKE) --no-print-directory -j2 types quick

quick:
	$(call install,$(DEVELOPING))
	$(PYTEST) -m 'not slow and not scale'

everything:
	$(call install,$(DEVELOPING))
	$(PYTEST) --no-loadscope-reorder

# In one session, since a second one would import everything again. Files with slow tests come first.
test-all: style
	@$(MAKE) --no-print-directory -j2 types everything

SCALE_LOG = benchmarks/results/scale.txt
test-scale:
	$(call install,$(DEVELOPING))
	@$(BIN)/python -m benchmarks.systems.scale_versions > $(SCALE_LOG)
	@set -e; failed=$$(mktemp); \
	for tests in tests/parallel tests/original/test_cache.py; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest $$tests -m 'scale or not scale' -v --no-header $(ARGS) \
	  || echo failed > $$failed; done | tee -a $(SCALE_LOG); \
	! [ -s $$failed ]

lint: style
	@$(MAKE) --no-print-directory types

style:
	$(call install,$(DEVELOPING))
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-logo

types:
	$(call install,$(DEVELOPING))
	$(BIN)/python -m mypy

format:
	$(call install,$(DEVELOPING))
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Strictly: a broken link or a page that the navigation lacks is an error.
docs:
	$(call install,docs)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

# In .venv if there is one, else with PYTHON: it installs nothing by itself and needs no network.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.systems.gpu_stages \
	  $(if $(STAGE),--stage $(STAGE)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(DRY),--dry-run) \
	  $(if $(RESULTS),--results $(RESULTS)) $(if $(WORK),--work $(WORK)) $(ARGS)

gpu-wheels:
	$(call install,$(DEVELOPING))
	$(BIN)/python -m benchmarks.systems.gpu_wheels $(or $(WHEELS),wheels) $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Installs a set of extras once, and again when pyproject.toml has changed.
installed: STAMP = $(VENV)/.has-$(EXTRAS)
installed: venv
	@[ $(STAMP) -nt pyproject.toml ] || { \
	  echo 'Installing fasterase[$(EXTRAS)] into $(VENV); this takes minutes.' && \
	  { $(BIN)/python -c 'import torch' 2>/dev/null || printf '%s\n' \
	    'It downloads about 0.7 GB, but on Linux 2 to 4 GB, since the torch that pip takes by' \
	    'default there brings CUDA. For a CPU alone give PIP_ARGS="--extra-index-url URL" with' \
	    'the URL of the CPU wheels from the install page of PyTorch.'; } && \
	  $(PIP) install --quiet $(PIP_ARGS) --editable '.[$(EXTRAS)]' && touch $(STAMP); }

# Makes .venv where there is none or where an earlier try was cut short.
venv:
	@command -v git >/dev/null || echo 'Note: git is missing; $(APT).'
	@set -e; \
	if [ -e $(VENV)/.unfinished ] || ! $(PIP) --version >/dev/null 2>&1; then \
	  command -v $(PYTHON) >/dev/null || { \
	    echo '$(PYTHON) is missing; $(APT), or name another with PYTHON=.'; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "fasterase needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version);" \
	      'name another with PYTHON=.'; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo '$(PYTHON) cannot make virtual environments; $(APT).'; exit 1; }; \
	  if [ -e $(VENV) ]; then echo 'Removing the half-made $(VENV).'; rm -rf $(VENV); fi; \
	  echo "Making $(VENV) with $$($(PYTHON) --version)."; \
	  mkdir $(VENV); \
	  touch $(VENV)/.unfinished; \
	  $(PYTHON) -m venv $(VENV); \
	  rm $(VENV)/.unfinished; \
	fi

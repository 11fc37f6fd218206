# The project's commands. Each sets up what it needs; `make demo` and `make test` work on a fresh machine with Python 3.10 to 3.12.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A1111's packages (torch 2.1.2) have no builds for Python 3.12.
A1111_PYTHON ?= $(shell for p in "$(PYTHON)" python3.10 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null && echo "$$p" && break; done)
A1111_VENV := .venv-a1111
A1111_BIN := $(A1111_VENV)/bin
NEO_PYTHON ?= $(shell for p in python3.13 "$(PYTHON)"; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null && echo "$$p" && break; done)
NEO_VENV := .venv-neo
NEO_BIN := $(NEO_VENV)/bin
# A process for each processor; a file's tests stay together, with what they have prepared.
PARALLEL := -n auto --dist loadfile

.PHONY: help demo test test-a1111 test-neo check format bench quality clean

help:
	@echo "make demo        two LoRAs in one picture, in four ways: a page to look at, in out/demo/"
	@echo "make test        the tests under Forge's packages"
	@echo "make test-a1111  the tests under A1111's packages"
	@echo "make test-neo    the tests under Forge Neo's packages, where there is a Python 3.13"
	@echo "make check       formatting, lint and types"
	@echo "make format      format the code"
	@echo "make bench       what fusion and guidance cost on this machine"
	@echo "make quality     which fusion is better in the miniature world, in out/quality/"

demo: $(VENV)/.ready
	$(BIN)/python -m lib_dynfuse demo --out out/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PARALLEL)

# The miniature world is no part of the extension: its tests run once, with diffusers.
test-a1111: $(A1111_VENV)/.ready
	$(A1111_BIN)/python -m pytest $(PARALLEL) --ignore tests/world

ifeq ($(NEO_PYTHON),)
test-neo:
	@echo "There is no Python 3.13 on this machine, which Forge Neo's packages need: nothing was tested. make NEO_PYTHON=... test-neo"
else
test-neo: $(NEO_VENV)/.ready
	$(NEO_BIN)/python -m pytest $(PARALLEL) --ignore tests/world
endif

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready
	$(BIN)/python -m lib_dynfuse bench fusion
	$(BIN)/python -m lib_dynfuse bench guidance

quality: $(VENV)/.ready
	$(BIN)/python -m lib_dynfuse toy bench --pairs reported --pictures out/quality

clean:
	rm -rf $(VENV) $(A1111_VENV) $(NEO_VENV) out .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.ready: requirements/forge.txt requirements/development.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing the packages into $(VENV) (some gigabytes: PyTorch comes with its CUDA libraries) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/forge.txt -r requirements/development.txt
	@touch $@

$(A1111_VENV)/.ready: requirements/a1111.txt requirements/development.txt
	@test -n "$(A1111_PYTHON)" || { echo "Python 3.10 or 3.11 is needed for A1111's packages: make A1111_PYTHON=python3.10 test-a1111"; exit 1; }
	@echo "Installing A1111's packages into $(A1111_VENV) ..."
	$(A1111_PYTHON) -m venv $(A1111_VENV)
	$(A1111_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/a1111.txt -r requirements/development.txt
	@touch $@

$(NEO_VENV)/.ready: requirements/neo.txt requirements/development.txt
	@echo "Installing Forge Neo's packages into $(NEO_VENV) ..."
	$(NEO_PYTHON) -m venv $(NEO_VENV)
	$(NEO_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/neo.txt -r requirements/development.txt
	@touch $@

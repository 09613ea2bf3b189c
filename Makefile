# Everything a contributor runs. `make` lists the targets.

# An interpreter of Python 3.11 or newer, and where its environment is made.
PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
ARGS ?=

# The tests start hundreds of processes; each would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check -c constraints.txt

# A stamp is newer than these files when the environment matches them. Its name holds the
# interpreter, so that another PYTHON makes a new environment instead of using the old one.
INPUTS := pyproject.toml constraints.txt
FULL := $(VENV)/full-$(notdir $(PYTHON)).stamp
SMALL := $(VENV)/small-$(notdir $(PYTHON)).stamp
PEERS := $(BENCH_VENV)/peers-$(notdir $(PYTHON)).stamp

.DEFAULT_GOAL := help
.PHONY: help setup check test demo bench scaling mutants soak format clean
# The recipes share environments, so two of them must never build one at once.
.NOTPARALLEL:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nARGS are passed on:        make test ARGS="tests/unit -k name"\n'
	@printf 'Another interpreter:       make test PYTHON=python3.12\n'

setup: $(FULL) ## Make .venv with all that the checks, tests and demo need

check: $(FULL) ## Check format, lint, types and layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@out=$$($(BIN)/lint-imports --no-cache 2>&1) || { echo "$$out"; exit 1; }
	@echo "All checks passed."

test: $(FULL) ## Run the tests on all cores
	@$(BIN)/python -m pytest -n auto --dist worksteal -q $(ARGS)

demo: $(SMALL) ## See a fleet share one circuit (needs no Redis of your own)
	@$(BIN)/python -m scripts.demo $(ARGS)

bench: $(PEERS) ## Measure speed and cost beside other breakers; writes docs/benchmarks.md
	@$(BENCH_VENV)/bin/python -m scripts.bench $(ARGS)

scaling: $(FULL) ## Measure what one server carries, and what a larger fleet needs
	@$(BIN)/python -m scripts.scaling $(ARGS)

mutants: $(FULL) ## Change the twins in thousands of ways; the tests must find each
	@$(BIN)/python -m scripts.mutants $(ARGS)

soak: $(FULL) ## Simulate, and drive a fleet among faults, for minutes or hours
	@$(BIN)/python -m tests.soak $(ARGS)

format: $(FULL) ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean: ## Remove the environment, builds and caches
	@rm -rf $(VENV) $(BENCH_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew (--clear), so that nothing stays in it that is no longer asked for.
$(FULL): $(INPUTS)
	@$(call require_python)
	@echo "Setting up $(VENV) (a minute or so) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e '.[dev,demo,hiredis]'
	@touch $(FULL) $(SMALL)

# The demo needs little. It uses the full environment where there is one, and else makes a small
# one, which `make setup` later replaces.
$(SMALL): $(INPUTS)
	@$(call require_python)
	@echo "Setting up $(VENV) for the demo ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) -e '.[demo]'
	@touch $(SMALL)

# The other breakers are measured in an environment of their own, so that nothing else needs them.
$(PEERS): $(INPUTS)
	@$(call require_python)
	@echo "Setting up $(BENCH_VENV) ..."
	@$(PYTHON) -m venv --clear $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python $(PIP_INSTALL) -e '.[bench,hiredis]'
	@touch $(PEERS)

define require_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "$(PYTHON) is absent or older than Python 3.11; name another: make ... PYTHON=python3.12" >&2; exit 1; }
endef

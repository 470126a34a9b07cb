# Each target first makes the environment it needs (see scripts/environment.sh) and uses it again afterwards.
#
#   make test WORKERS=8         tests on eight processes
#   make test PYTHON=python3.12 another interpreter for a new environment

WORKERS ?= 2
PYTEST_ARGS ?=
PYTEST = JAX_PLATFORMS=cpu $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-slow test-latest lint format bench docs notebooks clean distclean environment environment-slow environment-latest
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: environment ## convert the two small checkpoints of this repository; one reads handwritten digits, one talks about them
	.venv/bin/flax-vlm demo

test: environment ## every test that a user would run, on the CPU
	$(call PYTEST,.venv) -m "not slow" $(PYTEST_ARGS)

test-slow: environment-slow ## full-size checks, some of which ask the TPU compiler
	$(call PYTEST,.venv) -m slow $(PYTEST_ARGS)

test-latest: environment-latest ## the tests that need no torch, on Python 3.12 with the newest jax and flax
	$(call PYTEST,.venv-latest) -m "not torch and not slow" $(PYTEST_ARGS)

lint: environment ## ruff and pyright
	@mkdir -p .venv/pyright/flax_vlm && ln -sfn ../../../convert .venv/pyright/flax_vlm/convert
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: environment ## let ruff fix and format what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: environment ## ours against torch, in one table
	.venv/bin/python -m benchmarks

docs: environment ## the documents and the API as a site, in build/docs
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx -W --keep-going -E -q -d build/doctrees docs build/docs

notebooks: environment ## run the notebooks, and store what they show
	.venv/bin/python scripts/notebooks.py

clean: ## remove build outputs and caches; the environments stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache demo-output docs/notebooks
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments
	rm -rf .venv .venv-latest

# Python 3.11 first: constraints.txt was tested there.
environment:
	@PYTHON="$(PYTHON)" scripts/environment.sh .venv constraints.txt dev 3.11 3.12 3.13

# The same with the compiler of TPUs, 250 MB.
environment-slow:
	@PYTHON="$(PYTHON)" scripts/environment.sh .venv constraints.txt dev,tpu 3.11 3.12 3.13

# jax from 0.11 on needs Python 3.12.
environment-latest:
	@PYTHON="$(PYTHON)" scripts/environment.sh .venv-latest constraints-latest.txt test 3.12

# make help lists the targets. ENV chooses the environment: k2 (the default) or modern.
ENV ?= k2
VENV := .venv-$(ENV)
PY := $(VENV)/bin/python
TESTS ?= tests
SHELL := /bin/bash

ifeq ($(filter k2 modern,$(ENV)),)
$(error ENV=$(ENV) is no environment; use ENV=k2 or ENV=modern)
endif

ifneq ($(word 2,$(CURDIR)),)
$(error $(CURDIR): make cannot work in a path with a space; move the repository)
endif

.DEFAULT_GOAL := help
.PHONY: help setup test test-fast lint format generated lock wheel demo smoke ci clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ENV=k2      Python 3.11, torch 1.13.1, k2 1.23.4 (the default)"
	@echo "  ENV=modern  Python 3.11 or newer, torch 2.13.0, no k2"

setup: $(VENV)/.stamp ## install the environment in .venv-k2 or .venv-modern, without root

# The stamp is the last thing the script writes; a lock file, the project's metadata or the script itself outdates it.
$(VENV)/.stamp: requirements/$(ENV).txt requirements/$(ENV).hashes.txt requirements/k2-wheel.txt pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(ENV)

test: setup ## run every test (TESTS=tests/test_config.py for some)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal $(TESTS)

test-fast: setup ## run the tests that take a moment each, of every package
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal -m "not slow" $(TESTS)

lint: setup ## check style, formatting, types and which package imports which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --cache-dir .mypy_cache/$(ENV)
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: setup ## format the code and apply safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

generated: setup ## rewrite the tables in docs/, settings.json and the list of the interface in tests/golden/
	$(PY) scripts/generated.py

# torch's file in `modern` differs from machine to machine, see scripts/setup.sh.
HASHED = $(VENV)/bin/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --python-version 3.11 \
    --custom-compile-command "make lock"
lock: ## look up the hashes of the versions in requirements/k2.txt and modern.txt
	$(HASHED) requirements/k2.txt --output-file requirements/k2.hashes.txt
	$(HASHED) requirements/modern.txt --no-emit-package torch --output-file requirements/modern.hashes.txt

wheel: setup ## build the wheel from what is committed, and use it from an empty environment
	scripts/try_wheel.sh $(ENV)

demo: setup ## from real speech to a measured recognizer
	$(MAKE) -C recipes/prompts ASRKIT=$(CURDIR)/$(VENV)/bin/asrkit $(if $(YARDSTICK),YARDSTICK=$(YARDSTICK))

smoke: setup ## the demo's chain in a minute, on a sliver of the data
	$(MAKE) -C recipes/prompts smoke ASRKIT=$(CURDIR)/$(VENV)/bin/asrkit

ci: ## what CI runs: tests and lint in both environments, the wheel, the smoke run
	.ci/run

clean: ## remove environments and caches; data and experiments stay
	rm -rf .venv-k2 .venv-modern .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

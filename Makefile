# Each target does all of its own set-up; `make help` lists them.
PYTHON ?= python3
SEEDS ?= 1
STEPS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
DEMO := $(PY) tools/demo.py --seeds $(SEEDS) $(if $(STEPS),--steps $(STEPS))

.DEFAULT_GOAL := help
.PHONY: help venv check lint format test nightly demo bench lock audit clean

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## Installs everything into .venv, from requirements.lock (PYTHON=python3.12 to choose)

# The lock alone decides versions: the project itself goes in without its dependencies, and is built
# by the setuptools of the lock.
$(STAMP): requirements.lock setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing about 7 GB of packages into $(VENV); that takes minutes."
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

check: lint ## Formatting, ruff, mypy and the fast tests
	$(PYTEST) -m "not slow"

lint: $(STAMP) ## Formatting, ruff, mypy
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

format: $(STAMP) ## Rewrites files in the form that lint requires
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format

test: $(STAMP) ## All tests but those for the night
	$(PYTEST) -m "not nightly"

nightly: $(STAMP) ## The whole test suite, with runs on several machines
	$(PYTEST)

demo: $(STAMP) ## Trains labeled only, UDA and MPL on handwritten digits (SEEDS=3 for mean and sd)
	$(DEMO)

bench: $(STAMP) ## Every benchmark once, tiny, in about five minutes: proves that they run, not speed
	$(PY) -m tools.bench all --smoke --out runs/bench

lock: ## Resolves setup.py anew into requirements.lock, for every Python that it allows
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --disable-pip-version-check --quiet uv
	build/lock/bin/uv pip compile setup.py --extra dev --universal --python-version 3.10 --upgrade \
	  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  --output-file requirements.lock

# Strict: a package that the database does not answer for is an error, not one without faults.
audit: ## Known vulnerabilities of the packages of requirements.lock, by pip-audit; asks pypi.org
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --disable-pip-version-check --quiet pip-audit
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

clean: ## Removes .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

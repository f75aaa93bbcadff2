# Two commands for a newcomer: `make demo` and `make test`. Every target makes its own .venv from
# constraints.txt when it is missing or outdated, and does nothing slow the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help build demo test lint bench gpu-compile clean
help:
	@echo "make demo         explain and steer a real language model on this machine (writes demo-report/)"
	@echo "make test         lint, every test, every GPU kernel compiled ahead of time"
	@echo "make lint | bench | gpu-compile | build | clean"

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
	$(PIP) pytest ruff triton
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

clean:
	rm -rf $(VENV) build demo-report fastsae/*.so

#!/usr/bin/env bash
# Builds, tests and measures fastsae on a machine with an NVIDIA GPU, in under nine minutes:
#
#   benchmarks/gpu_check.sh [NAME] [DIRECTORY]
#
# Needs torch with CUDA, Triton, nvcc, setuptools, ninja, numpy, safetensors and pytest in the python3 on PATH (or in
# $PYTHON); fetches nothing. Writes DIRECTORY/gpu-NAME.csv (default: the GPU's name, benchmarks/results).
# Every phase has its own time limit; a phase that fails does not stop the next, and the summary at the
# end says what each one did. The exit status is 0 only if all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$site
summary=()
failed=0

phase() { # phase NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  printf '\n== %s (at most %s s)\n' "$name" "$limit"
  timeout -k 5 "$limit" "$@"
  local status=$?
  local verdict=passed
  [ $status -eq 124 ] && verdict="ran out of time"
  [ $status -ne 0 ] && [ $status -ne 124 ] && verdict="FAILED (exit $status)"
  [ $status -ne 0 ] && failed=1
  summary+=("$(printf '%-24s %4d s  %s' "$name" $((SECONDS - started)) "$verdict")")
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -2
  "$python" - <<'PY'
import torch, triton
print("torch", torch.__version__, "triton", triton.__version__)
major, minor = torch.cuda.get_device_capability()
print("arch", f"{major}.{minor}{'a' if major >= 9 else ''}")
PY
}

build() { # into a folder of its own: what is measured is what a user installs
  FASTSAE_BUILD=auto MAX_JOBS=$(nproc) "$python" -m pip install --quiet --no-index --no-deps \
    --no-build-isolation --target "$site" .
}

tests() { # the ids of tests that ran on the GPU contain "cuda"
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
  # cuBLAS refuses torch's deterministic mode, which tests switch on, without this.
  CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -P -m pytest -q -k cuda --durations=5 "${workers[@]}" tests/test_topk.py \
    tests/test_encode.py tests/test_encode_threshold.py tests/test_encode_gradients.py \
    tests/test_decode.py tests/test_mi.py tests/test_steer.py tests/test_invariance.py
}

export -f machine build tests
export python site
phase machine 60 bash -c machine
arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability()
print(f"{m}.{n}" + ("a" if m >= 9 else ""))' 2>/dev/null) && export TORCH_CUDA_ARCH_LIST=$arch
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' ' '-' | tr A-Z a-z)
csv=${2:-benchmarks/results}/gpu-${1:-${gpu:-none}}.csv
phase build 160 bash -c build
phase tests 140 bash -c tests
phase measure 165 "$python" -P benchmarks/ops.py --device cuda --budget 130 --out "$csv"
# Not run yet on any machine: graph capture and the V2 runner of vLLM.
serving() { "$python" -P benchmarks/vllm_load.py --compile --width 4096 --layers 16 --features 32768 --rounds 1 --out "$csv_vllm"; }
export -f serving
export csv_vllm=${csv%.csv}-vllm.csv
if "$python" -c 'import vllm' 2>/dev/null; then phase serving 900 bash -c serving; fi

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $failed

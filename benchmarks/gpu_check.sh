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
  # An interrupted pytest still tells what failed; a terminated one tells nothing.
  timeout -s INT -k 15 "$limit" "$@"
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
  local wanted status=0 log=$site/build.log
  for wanted in auto cpu none; do # where CUDA C++ does not build in time, the Triton kernels still run
    FASTSAE_BUILD=$wanted MAX_JOBS=$(nproc) timeout -k 5 90 "$python" -m pip install --quiet --no-index --no-deps \
      --no-build-isolation --target "$site" . >"$log" 2>&1 && break
    status=1
    printf 'FASTSAE_BUILD=%s: FAILED\n' "$wanted"
    grep -E '[Ee]rror|undefined|cannot find' "$log" | head -20 # the compiler's lines are far from the end
    tail -10 "$log"
  done
  rm -f "$log"
  return $status
}

tests() { # the ids of tests that ran on the GPU contain "cuda"
  local workers=() # a test's time is the compilation of its kernels, on one core
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n $((($(nproc) * 3 + 3) / 4)) --dist worksteal)
  # cuBLAS refuses torch's deterministic mode, which tests switch on, without this.
  local files
  files=$(grep -lE 'mark\.op\(|[(,] ?device\b' tests/test_*.py)
  # shellcheck disable=SC2086  # names of test files hold no blanks
  OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -P -m pytest -q --tb=short -k cuda \
    --durations=5 --continue-on-collection-errors "${workers[@]}" $files
}

graphs() { # replays of captured calls equal eager calls
  "$python" -P benchmarks/graphs.py --device cuda --replays 10000 --budget 70
}

sanitize() { # a few calls of every op under compute-sanitizer, where it is installed
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
  if [ -z "$tool" ]; then
    echo "skipped: compute-sanitizer is not installed (it comes with the CUDA toolkit)"
    return 0
  fi
  local check status=0
  for check in memcheck racecheck; do
    # Without torch's pool every tensor is an allocation of its own, so a read beside it shows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 40 "$tool" --tool "$check" --error-exitcode 9 \
      "$python" -P benchmarks/graphs.py --device cuda --eager --replays 1
    case $? in
      0) echo "$check: clean" ;;
      124) echo "$check: stopped after 40 s, nothing found until then" ;;
      *) echo "$check: FAILED" && status=1 ;;
    esac
  done
  return $status
}

measure() {
  rm -f "$csv" # what an earlier run measured must not be judged
  "$python" -P benchmarks/ops.py --device cuda --budget 110 --out "$csv"
  local status=$?
  [ -f "$csv" ] && "$python" -P benchmarks/gpu_targets.py "$csv"
  return $status
}

serving() {
  "$python" -P benchmarks/vllm_load.py --compile --width 4096 --layers 16 --features 32768 \
    --rounds 1 --out "$csv_vllm"
}

export -f machine build tests graphs sanitize measure serving
export python site
phase machine 30 bash -c machine
arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability()
print(f"{m}.{n}" + ("a" if m >= 9 else ""))' 2>/dev/null) && export TORCH_CUDA_ARCH_LIST=$arch
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' ' '-' | tr A-Z a-z)
csv=${2:-benchmarks/results}/gpu-${1:-${gpu:-none}}.csv
export csv
phase build 130 bash -c build
phase tests 120 bash -c tests
phase graphs 85 bash -c graphs
phase measure 145 bash -c measure
# What is left of nine minutes, and no result hangs on it being long.
left=$((530 - SECONDS))
[ $left -gt 20 ] && phase sanitize $((left < 90 ? left : 90)) bash -c sanitize
# Beyond the nine minutes, only where vLLM is: graph capture and its V2 runner, not run yet anywhere.
export csv_vllm=${csv%.csv}-vllm.csv
"$python" -c 'import vllm' 2>/dev/null && phase serving 900 bash -c serving

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $failed

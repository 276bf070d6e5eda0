#!/usr/bin/env bash
# What a GPU that is lent for a quarter of an hour is asked, in calls that end in time:
#
#   bash benchmarks/on_gpu.sh OUT values          are the kernels right: 7 minutes at most
#   bash benchmarks/on_gpu.sh OUT speed tuning    are they fast: 8 minutes at most
#   bash benchmarks/on_gpu.sh OUT counters        what bounds the Hopper GEMM: 2 minutes
#
# From a checkout, with a python3 that has jax, flax, hypothesis, pytest-xdist and
# pytest-timeout, and with compute-sanitizer and ncu of the CUDA toolkit; nothing is
# installed or fetched, no setting of the GPU is changed. Each question has a time limit;
# all that is said goes to OUT/log, its end to the terminal.
# The last lines say how each ended, and so does the exit status.
# It can be tried without a GPU: JAX_PLATFORMS=cpu bash benchmarks/on_gpu.sh OUT values
set -uo pipefail

usage="usage: bash benchmarks/on_gpu.sh OUT values|speed|tuning|counters ..."
if [[ $# -lt 2 ]]; then
  echo "$usage" >&2
  exit 2
fi
out=$1
shift
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PATH+=:/usr/local/cuda/bin # ncu, compute-sanitizer
# Many processes share the GPU's memory and the cores of the oracle.
export XLA_PYTHON_CLIENT_PREALLOCATE=false OPENBLAS_NUM_THREADS=2 OMP_NUM_THREADS=2
command -v ptxas || echo "no ptxas on PATH: XLA looks for one in its own places" >&2
summary=()
status=0

ask() { # name, seconds, command
  local name=$1 limit=$2 started=$SECONDS ended
  shift 2
  printf '\n== %s: %s\n' "$name" "$*" | tee -a "$out/log"
  # Interrupted, pytest says which tests failed and the bench has its rows written.
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee -a "$out/log" | tail -n 25 | cut -c1-300
  ended=${PIPESTATUS[0]}
  summary+=("$name: exit status $ended after $((SECONDS - started)) s of $limit s")
  [[ $ended == 0 ]] || status=1
}

# A worker for each core but two: most of a test is compilation, on one core. A test that
# hangs costs a minute and its worker. A warning of packages unlike ours is no failure.
pytest=(python3 -m pytest -q -rfE -m gpu --dist=worksteal -W default --tb=short
  --timeout=60 --timeout-method=thread)
workers=$(($(nproc) > 3 ? $(nproc) - 2 : 1))
bench=(python3 -m pallas_kernels.bench)
goals=(--shape "8192,8192,8192" --shape "4096,44160,1024" --shape "1024,44160,4096")
# Reads and writes of shared memory, of their peak, and traffic of L2.
counted=l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed
counted+=,l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed
counted+=,lts__t_bytes.sum.per_second

# The products of the oracle are cuBLAS's there: XLA would compile a list of tiles for
# each, in every process.
values() {
  local -x XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
  ask smallest 60 python3 -m tests.pallas_kernels.smallest_products
  ask values 150 "${pytest[@]}" -n "$workers" tests/pallas_kernels \
    --ignore=tests/pallas_kernels/test_sanitizer.py
  ask memcheck 60 python3 -m tests.pallas_kernels.sanitizer memcheck
  ask racecheck 60 python3 -m tests.pallas_kernels.sanitizer racecheck
}

speed() {
  ask goals 75 "${bench[@]}" --quick "${goals[@]}" --output-dir "$out/goals"
  ask bench 105 "${bench[@]}" --quick --suite vit_l uses compression \
    --output-dir "$out/bench"
}

tuning() {
  ask tune_goals 60 "${bench[@]}" --tune --quick "${goals[@]}" --output-dir "$out"
  ask tune_x24 40 "${bench[@]}" --tune --quick --use "fprop x24" \
    --shape 44160,4096,1024 --shape 44160,1024,4096 --output-dir "$out"
  ask tune_x24_wgrad 40 "${bench[@]}" --tune --quick --use "wgrad x24ᵀ dy" \
    --shape 1024,4096,44160 --shape 4096,1024,44160 --output-dir "$out"
  ask step 70 python3 benchmarks/sparse_step.py --tuned "$out" --output-dir "$out"
}

# Four launches judge it and find how many fill a turn.
counters() {
  ask counters 90 ncu --clock-control none --kernel-name regex:nm_matmul \
    --launch-skip 4 --launch-count 1 --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section MemoryWorkloadAnalysis_Tables \
    --section ComputeWorkloadAnalysis --section LaunchStats --metrics "$counted" \
    "${bench[@]}" --shape 4096,44160,1024 --rounds 1 --milliseconds 20 \
    --output-dir "$out/counters"
}

for question in "$@"; do
  case $question in
    values | speed | tuning | counters) "$question" ;;
    *) echo "no question '$question'; $usage" >&2 && exit 2 ;;
  esac
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit $status

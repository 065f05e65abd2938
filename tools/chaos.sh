#!/usr/bin/env bash
# Runs the drills of the seeds SEED to SEED+SEEDS-1 in both delivery modes, detached; a drill whose JSON is in OUT already is not run again.
#   SEED=1 SEEDS=10 JOBS=2000 FAULTS=40 tools/chaos.sh
#   OUT=benchmarks/results/chaos writes where the results of this repository are kept; build/chaos is the default.
#   BROKERS=3 and BACKEND=native make a cluster of three, and let the shipped model answer. BACKEND=openai lets servers
#   answer, which fail: each of their faults once, without JOBS, FAULTS and BROKERS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/chaos}
mkdir -p build "$out"
export PYTHONPATH=$PWD SEED=${SEED:-1} SEEDS=${SEEDS:-1} JOBS=${JOBS:-2000} FAULTS=${FAULTS:-40} OUT=$out BROKERS=${BROKERS:-1} BACKEND=${BACKEND:-echo} PYTHON=${PYTHON:-.venv/bin/python}
# shellcheck disable=SC2016  # the inner shell expands it
setsid nohup nice -n 10 bash -c '
  for seed in $(seq "$SEED" $((SEED + SEEDS - 1))); do
    for delivery in exactly_once at_least_once; do
      if [ "$BACKEND" = openai ]; then
        "$PYTHON" tests/chaos/remote_drill.py --seed "$seed" --delivery "$delivery" --out "$OUT" || true
        continue
      fi
      "$PYTHON" tests/chaos/drill.py --seed "$seed" --jobs "$JOBS" --faults "$FAULTS" --delivery "$delivery" \
        --brokers "$BROKERS" --backend "$BACKEND" --out "$OUT" || true
    done
  done; echo finished' > build/chaos.log 2>&1 < /dev/null &
echo "detached as process $!; log: build/chaos.log; results: $out"

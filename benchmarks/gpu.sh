#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in less than eight minutes, from the working tree alone: see gpu.py.
#   bash benchmarks/gpu.sh --out runs/gpu
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/training:$root/export:$root/cli${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"

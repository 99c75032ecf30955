#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes and without a network:
#   bench/gpu_check.sh OUT [--device cpu]
# writes at most 8 files into OUT, summary.md first among them, and fails if any step did.
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_check.py" "$@"

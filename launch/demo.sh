#!/usr/bin/env bash
# The demo, from nothing to its report. More words go to it: launch/demo.sh --compare
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare demo

# XLA takes its memory anew for every step; keeping it saves a tenth of the time on a CPU
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
exec vlmem demo "$@"

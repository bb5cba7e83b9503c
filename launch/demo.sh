#!/usr/bin/env bash
# The demo, from nothing to its report. More words go to it: launch/demo.sh --compare
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare demo

exec vlmem demo "$@"

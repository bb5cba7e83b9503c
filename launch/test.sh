#!/usr/bin/env bash
# Every check: lint, format, layers, tests. More words go to pytest: launch/test.sh -m "not slow" tests/data
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare test

ruff check .
ruff format --check .
lint-imports
pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"

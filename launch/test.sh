#!/usr/bin/env bash
# Every check: lint, format, layers, tests; or, while one works on a change, those that it touches.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'END'
usage: launch/test.sh [--quick] [words of pytest ...]

Lint, format, layers, then all tests.

  --quick   in less than two minutes: the tests of what differs from origin/main, or main where there is no origin, new
            and uncommitted files too. A changed file's own test comes first (vlmem_jax/train/loop.py has
            tests/train/test_loop.py), then the others of its folder; slow ones stay out, and so do those whose turn
            would come too late

example:
  launch/test.sh --quick
  launch/test.sh -m "not slow" tests/data
END
}

# What a change touches, a file a line.
changed() {
    local main base
    main=$(git rev-parse --quiet --verify origin/main || git rev-parse main)
    base=$(git merge-base "$main" HEAD)
    git diff --name-only "$base"
    git ls-files --others --exclude-standard
}

# Tests of the files on stdin, nearest first, each once.
nearest() {
    local file name folder test
    local -a own=() beside=()
    while read -r file; do
        case $file in
            tests/*) name=${file#tests/} own+=("$file") ;;
            vlmem_jax/*) name=${file#vlmem_jax/} ;;
            *) name=$file ;;
        esac
        folder=$(dirname "$name")
        beside+=("tests/$folder"/test_*.py)
        while [ "$name" != . ]; do # configs/tiny/comemo.py has tests/test_configs.py
            own+=("tests/$(dirname "$name")/test_$(basename "${name%.*}").py")
            name=$(dirname "$name")
        done
    done
    for test in "${own[@]}" "${beside[@]}"; do
        test=${test/\/.\//\/}
        if [[ $test == tests/*test_*.py && -f $test ]]; then echo "$test"; fi
    done | awk '!seen[$0]++'
}

quick=""
case ${1-} in
    --help) usage && exit ;;
    --quick) quick=yes && shift ;;
esac
prepare test
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the package
ruff check .
ruff format --check .
lint-imports
if [ -z "$quick" ]; then
    pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
    exit
fi
mapfile -t tests < <(changed | nearest)
if [ ${#tests[@]} = 0 ]; then
    echo "no test is near what has changed"
else # 5: the tests there are slow ones
    pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow" --seconds=75 "${tests[@]}" "$@" || [ $? = 5 ]
fi

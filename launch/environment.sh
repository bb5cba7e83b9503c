# shellcheck shell=bash
# Sourced by the scripts beside it. `prepare [EXTRA]` makes .venv at the root of the repository, installs the package with
# that extra into it, and puts it first on the path. Installs again only when setup.py has changed since.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python .venv/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "needs Python 3.11 or newer; name one with PYTHON=/path/to/python3.11" >&2
    return 1
}

prepare() {
    local extra=${1:+[$1]} stamp=.venv/.installed-${1:-base} want python
    want=$(cksum <setup.py)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        python=$(find_python)
        echo "installing vlmem_jax$extra into .venv, once; this takes a minute or two"
        # where the system's Python comes without ensurepip, its own pip fills the environment
        [ -x .venv/bin/python ] || "$python" -m venv .venv 2>/dev/null || "$python" -m venv --without-pip .venv
        if .venv/bin/python -m pip --version >/dev/null 2>&1; then
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extra"
        else
            "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check -e ".$extra"
        fi
        echo "$want" >"$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
}

#!/usr/bin/env bash
# What one host of a TPU slice does; tpu_vm.sh and gke.sh call it there.
#   worker.sh install            puts the package into .venv; brings a Python of its own where there is none new enough
#   worker.sh follow WORDS       runs `vlmem train --multihost WORDS`, and shows its log until it ends; it does not end with
#                                the connection, and the same command follows it again
#   worker.sh stop [SECONDS]     asks it to save and exit; kills it after SECONDS
#   worker.sh idle               fails if a training runs
#   worker.sh pod WORDS          runs `vlmem train --multihost WORDS` in a container
# Status 64 says that a training runs that this call did not mean.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# pid, command, status and log of the training on this host
folder=$HOME/.vlmem

install() {
    if ! find_python >/dev/null 2>&1; then
        python3 -m pip install --user --quiet uv
        python3 -m uv python install --quiet 3.11
        PYTHON=$(python3 -m uv python find 3.11)
    fi
    prepare tpu,gcs
}

running() { [ -f "$folder/pid" ] && grep -qs vlmem "/proc/$(<"$folder/pid")/cmdline"; }

busy() {
    echo "error: on $HOSTNAME runs vlmem train$(<"$folder/command"); stop it first, or follow it with: tpu_vm.sh train ..." >&2
    exit 64
}

idle() { ! running || busy; }

follow() {
    local command size=0 pid try lock
    printf -v command ' %q' "$@"
    mkdir -p "$folder"
    exec {lock}>"$folder/lock"
    flock "$lock"
    if running; then
        [ "$(<"$folder/command")" = "$command" ] || busy
    else
        rm -f "$folder/status" "$folder/pid"
        echo "$command" >"$folder/command"
        touch "$folder/log"
        size=$(stat -c %s "$folder/log")
        install
        # shellcheck disable=SC2016 # expanded by the inner shell
        setsid bash -c 'cd "$1" && shift
            vlmem train --multihost "${@:2}" & echo $! >"$1/pid"; code=0; wait $! || code=$?; echo $code >"$1/status"' \
            - "$PWD" "$folder" "$@" >>"$folder/log" 2>&1 </dev/null {lock}>&- &
        until running || [ -s "$folder/status" ]; do sleep 0.1; done
    fi
    exec {lock}>&-
    pid=$(<"$folder/pid")
    tail -c "+$((size + 1))" --pid="$pid" -F "$folder/log" | sed -u "s/^/[${HOSTNAME##*-}] /"
    for ((try = 0; try < 50; try++)); do [ ! -s "$folder/status" ] || exit "$(<"$folder/status")"; sleep 0.1; done
    exit 137 # killed before it could say how it ended
}

stop() {
    local pid left
    running || return 0
    pid=$(<"$folder/pid")
    kill -TERM "$pid"
    for ((left = ${1:-600}; left > 0; left--)); do
        running || return 0
        sleep 1
    done
    echo "vlmem train on $HOSTNAME did not end in ${1:-600} s and is killed" >&2
    kill -KILL -- "-$(ps -o pgid= -p "$pid" | tr -d ' ')" 2>/dev/null || true
}

# A pod that was asked to end is not done, although it saved: 143 makes JobSet start it again, 0 would not.
pod() {
    local code pid="" signalled="" stopped=""
    command -v vlmem >/dev/null || install
    trap 'signalled=1 stopped=1; kill -TERM "$pid" 2>/dev/null || true' TERM
    vlmem train --multihost "$@" &
    pid=$!
    [ -z "$stopped" ] || kill -TERM "$pid"
    while true; do
        signalled="" code=0
        wait "$pid" || code=$?
        [ -n "$signalled" ] || break
    done
    if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then code=143; fi
    exit "$code"
}

"$@"

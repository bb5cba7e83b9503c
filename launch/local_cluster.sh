#!/usr/bin/env bash
# Several processes on one machine, each with fake CPU devices, as one cluster: the same code paths as on a pod.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: launch/local_cluster.sh [options] --config FILE --workdir FOLDER [--config.key=value ...] [-- words]

Starts `vlmem train` in several processes that find each other through a free port. Each line of output begins with the
number of its process. SIGTERM and Ctrl-C go to all: they save and exit. When one fails, all are started again.

  --processes N       processes (default 2)
  --devices N         CPU devices of each process (default 4)
  --max-restarts N    starts after a failure (default 0)
  --dry-run           print the commands, run nothing

example:
  launch/local_cluster.sh --processes 2 --devices 4 --config configs/tiny/comemo.py --workdir /tmp/run --config.seed=3
END
}

option[processes]=2 option[devices]=4 option[max-restarts]=0
read_options "$@"
need_experiment
need_number processes 1
need_number devices 1
dry || command -v vlmem >/dev/null || prepare ""

declare -a pids=()
starting=""

# Each process has a group of its own, so that Ctrl-C at a terminal reaches it once, from here: a second signal would
# end it without saving.
forward() {
    stopping=$1
    [ -n "$starting" ] || kill -"$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

free_port() {
    local port
    while true; do # above the ports that Linux gives to clients
        port=$((61000 + RANDOM % 4500))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

# Starts all processes and waits for them. Gives the status of the first that failed; the others cannot go on without it.
cluster() {
    local port output index finished status=0 code
    local -a command prefixers=()
    port=$(free_port)
    pids=() starting=yes
    for ((index = 0; index < option[processes]; index++)); do
        command=(
            env JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
            "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${option[devices]}"
            vlmem train "${train[@]}" "--coordinator=127.0.0.1:$port" "--processes=${option[processes]}" "--process=$index"
        )
        if dry; then
            quote "${command[@]}"
            continue
        fi
        exec {output}> >(trap '' INT TERM && exec sed -u "s/^/[$index] /")
        prefixers+=($!)
        set -m
        "${command[@]}" </dev/null >&"$output" 2>&1 &
        pids+=($!)
        set +m
        exec {output}>&-
    done
    starting=""
    [ -z "$stopping" ] || forward "$stopping"

    while [ ${#pids[@]} -gt 0 ]; do
        code=0 finished=""
        wait -n -p finished "${pids[@]}" 2>/dev/null || code=$?
        [ -n "${finished-}" ] || continue # a signal came
        kill -KILL -- "-$finished" 2>/dev/null || true # workers that it left behind
        for index in "${!pids[@]}"; do
            [ "${pids[$index]}" != "$finished" ] || unset "pids[$index]"
        done
        if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
            status=$code
            [ -n "$stopping" ] || for index in "${pids[@]}"; do kill -KILL -- "-$index" 2>/dev/null || true; done
        fi
    done
    [ ${#prefixers[@]} -eq 0 ] || wait "${prefixers[@]}" || true
    return "$status"
}

with_restarts cluster

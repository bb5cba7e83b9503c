#!/usr/bin/env bash
# Trains on a slice of TPU VMs that comes from the queue of Google Cloud.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: launch/tpu_vm.sh [run | train | stop | delete] --name NAME --zone ZONE [options]
                        --type TYPE --config FILE --workdir gs://BUCKET/FOLDER [--config.key=value ...] [-- words]

  run       asks for the slice, waits until it is there, copies the repository (the files that git knows), installs it on
            all hosts, and trains (default)
  train     trains on a slice where run has been before, or follows the training that goes on there
  stop      saves and ends the training; the slice stays, and costs
  delete    gives the slice back

After a failure the training is started again, and a slice that was preempted is asked for again. SIGTERM and Ctrl-C are
passed on: all hosts save and exit. A training does not end with the connection to it.

  --name NAME                of the slice and of its request
  --zone ZONE                such as us-west4-a
  --project PROJECT          (default: as gcloud is set)
  --type TYPE                v5litepod-16 (v5e 4x4), v5p-128 (v5p 4x4x4), ...
  --spot | --reserved        kind of capacity (default: on demand)
  --runtime-version NAME     of the TPU software (default: the one for the type)
  --create="WORDS"           more options of `gcloud compute tpus queued-resources create`, such as
                             --create="--service-account=train@PROJECT.iam.gserviceaccount.com"
  --setup COMMAND            runs on each host after the installation, in the repository, to bring data there
  --compile-cache FOLDER     keeps compiled programs; a folder that all hosts share
  --delete                   give the slice back when the training is done, or failed too often
  --poll SECONDS             between looks at the queue, and before a restart (default 30)
  --max-restarts N           starts after a failure (default 3)
  --dry-run                  print the commands, run nothing

example:
  launch/tpu_vm.sh --name comemo --zone us-west4-a --type v5litepod-16 --spot --max-restarts 20 \
      --config configs/comemo_2b.py --workdir gs://BUCKET/runs/comemo --config.seed=3
END
}

action=run
case ${1-} in
    run | train | stop | delete)
        action=$1
        shift
        ;;
esac
option[name]="" option[zone]="" option[project]="" option[type]="" option[runtime-version]="" option[create]=""
option[setup]="" option[compile-cache]="" option[poll]=30
switch[spot]=no switch[reserved]=no switch[delete]=no
read_options "$@"
need name "the name of the slice"
need zone "where the slice is, such as us-west4-a"
need_number poll 0
need_command gcloud "see https://cloud.google.com/sdk/docs/install"
if [[ $action == run || $action == train ]]; then
    need_experiment
    need_tracked_config
    need type "the accelerator type, such as v5litepod-16"
    [[ ${switch[spot]} == no || ${switch[reserved]} == no ]] || fail "--spot and --reserved exclude each other"
    case ${option[type]} in
        v5litepod-*) : "${option[runtime-version]:=v2-alpha-tpuv5-lite}" ;;
        v5p-*) : "${option[runtime-version]:=v2-alpha-tpuv5}" ;;
        v6e-*) : "${option[runtime-version]:=v2-alpha-tpuv6e}" ;;
    esac
    need runtime-version "since --type ${option[type]} is none that has a default"
fi

name=${option[name]}
place=("--zone=${option[zone]}")
[ -z "${option[project]}" ] || place+=("--project=${option[project]}")

# Of the request, and once that is granted, of the slice; empty where there is none.
state() {
    local now
    now=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)" 2>/dev/null) || return 0
    [ "$now" != ACTIVE ] ||
        now=$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" "--format=value(state)" 2>/dev/null) || now=ACTIVE
    echo "$now"
}

# Unlike sleep alone, ends with a signal.
pause() {
    sleep "${option[poll]}" &
    wait $! || true
}

create() {
    local -a words=()
    read -ra words <<<"${option[create]}"
    [ "${switch[spot]}" = no ] || words+=(--spot)
    [ "${switch[reserved]}" = no ] || words+=(--reserved)
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
        "--accelerator-type=${option[type]}" "--runtime-version=${option[runtime-version]}" "${words[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all "--command=$1"; }

worker() { echo "cd vlmem_jax && bash launch/worker.sh $(quote "$@")"; }

training() { echo "$(export_cache " && ")$(worker follow "${train[@]}")"; }

# Returns when the slice is there; a new one has nothing installed.
ensure_slice() {
    local now former=""
    while [ -z "$stopping" ]; do
        now=$(state)
        case $now in
            READY) return ;;
            SUSPENDED | PREEMPTED | TERMINATED)
                say "slice $name was preempted"
                delete || return
                ;;
            "")
                create || return
                installed=""
                ;;
            FAILED)
                gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2
                say "the request for $name failed, see above; remove it with: launch/tpu_vm.sh delete ..."
                return 1
                ;;
            *)
                [ "$now" = "$former" ] || say "slice $name: $now"
                former=$now
                pause
                ;;
        esac
    done
    return 130
}

copy() {
    local folder archive
    folder=$(mktemp -d)
    archive=$folder/vlmem_jax.tar.gz
    if dry; then
        echo "git ls-files -z | tar --null --files-from - -czf $archive"
    else
        tracked_files | tar --null --files-from - -czf "$archive" || return
    fi
    run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all || return
    rm -r "$folder"
    on_workers "if [ -f vlmem_jax/launch/worker.sh ]; then bash vlmem_jax/launch/worker.sh idle; fi && mkdir -p vlmem_jax && tar -xzf vlmem_jax.tar.gz -C vlmem_jax && $(worker install)" || return
    [ -z "${option[setup]}" ] || on_workers "cd vlmem_jax && ${option[setup]}" || return
    installed=yes
}

# Starts a command on the hosts. It has a process group of its own: Ctrl-C must not cut the connection.
connections=()
remote() {
    set -m
    on_workers "$1" </dev/null &
    connections+=($!)
    set +m
}

# Follows the training until it ends; a signal makes it end.
follow() {
    local code connection asked=""
    remote "$(training)"
    connection=$!
    while true; do
        signalled="" code=0
        wait "$connection" || code=$?
        [ -n "$signalled" ] || break
        if [ -z "$asked" ]; then
            asked=yes
            say "all hosts save and exit; another signal leaves them alone"
            remote "$(worker stop)"
        fi
    done
    wait || true
    return "$code"
}

# Status 255 comes from ssh: the hosts go on, and are followed again. 64: they train something else, which is left alone.
# After any other status the rest of the hosts must not go on.
last=0
attempt() {
    [ "$last" -eq 0 ] || pause
    ensure_slice || return
    if [[ -n $installed && $last -ne 0 && $last -ne 255 ]]; then
        on_workers "$(worker stop 60)" || true
    fi
    [ -z "$stopping" ] || return 130
    last=0
    [ -n "$installed" ] || copy || last=$?
    [ "$last" -ne 0 ] || follow || last=$?
    [ "$last" -ne 64 ] || exit 64
    return "$last"
}

signalled=""
on_signal() {
    if [ -n "$stopping" ]; then
        for connection in "${connections[@]}"; do kill -- "-$connection" 2>/dev/null || true; done
        exit 130
    fi
    stopping=yes signalled=yes
}

case $action in
    stop)
        on_workers "$(worker stop)"
        exit
        ;;
    delete)
        delete
        exit
        ;;
    run) installed="" ;;
    train) installed=yes ;;
esac

if dry; then
    echo "# unless the slice is there"
    create
    echo "# until they say ACTIVE and READY; a preempted slice is deleted and asked for again"
    quote gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)"
    quote gcloud compute tpus tpu-vm describe "$name" "${place[@]}" "--format=value(state)"
    [ "$action" = train ] || copy
    echo "# at most ${option[max-restarts]} times more after a failure"
    on_workers "$(training)"
    echo "# on SIGTERM or Ctrl-C"
    on_workers "$(worker stop)"
    [ "${switch[delete]}" = no ] || { echo "# in the end" && delete; }
    exit
fi

trap on_signal TERM INT
code=0
with_restarts attempt || code=$?
if [ -z "$stopping" ] && [ "${switch[delete]}" = yes ]; then
    delete
else
    say "$name still costs, or waits in the queue; give it back with: launch/tpu_vm.sh delete --name $name ${place[*]}"
fi
[ "$code" -eq 0 ] || exit "$code"

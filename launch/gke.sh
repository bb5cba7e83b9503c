#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that was made with xpk (https://github.com/AI-Hypercomputer/xpk).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: launch/gke.sh --cluster CLUSTER --type TYPE [options]
                     --config FILE --workdir gs://BUCKET/FOLDER [--config.key=value ...] [-- words]

Submits a JobSet that starts `vlmem train --multihost` on every host. Kubernetes sends SIGTERM before it takes a host away;
the processes save and exit, and the JobSet starts all of them again, as after a failure.

  --cluster CLUSTER          made with: xpk cluster create
  --type TYPE                v5litepod-16 (v5e 4x4), v5p-128 (v5p 4x4x4), ...
  --slices N                 (default 1)
  --name NAME                of the workload (default vlmem)
  --project, --zone NAME     (default: as gcloud is set)
  --image IMAGE              has the repository as its working folder, installed with .[tpu,gcs]; without it, the files that git
                             knows are added to --base-image, and each start installs the package
  --base-image IMAGE         (default python:3.11)
  --setup COMMAND            runs on each host before the training, in the repository
  --compile-cache FOLDER     keeps compiled programs; a folder that all hosts share
  --grace SECONDS            for saving, when a pod is deleted (default 300)
  --xpk="WORDS"              more options of `xpk workload create`, such as --xpk="--storage data --priority high"
  --max-restarts N           starts after a failure or a preemption (default 3)
  --dry-run                  print the commands, run nothing

example:
  launch/gke.sh --cluster tpus --type v5p-128 --name comemo --max-restarts 50 \
      --config configs/comemo_2b.py --workdir gs://BUCKET/runs/comemo --config.seed=3

Watch and stop it with: xpk workload list --cluster CLUSTER; xpk workload delete --cluster CLUSTER --workload NAME. The
same command goes on.
END
}

option[cluster]="" option[type]="" option[slices]=1 option[name]=vlmem option[project]="" option[zone]=""
option[image]="" option[base-image]=python:3.11 option[setup]="" option[compile-cache]="" option[grace]=300 option[xpk]=""
read_options "$@"
need_experiment
need_tracked_config
need cluster "the cluster, made with: xpk cluster create"
need type "the accelerator type, such as v5litepod-16"
need_number slices 1
need_number grace 1
[[ ${option[setup]} != *$'\n'* ]] || fail "--setup must be one line"
need_command xpk "pip install xpk"

# All of it is one line in a subshell of xpk, which sends SIGTERM to that subshell.
in_the_pod() {
    [ -z "${option[setup]}" ] || echo -n "${option[setup]} && "
    echo "$(export_cache " && ")exec bash launch/worker.sh pod $(quote "${train[@]}")"
}

words=()
read -ra words <<<"${option[xpk]}"
for name in project zone; do
    [ -z "${option[$name]}" ] || words+=("--$name=${option[$name]}")
done
if [ -n "${option[image]}" ]; then
    words+=("--docker-image=${option[image]}")
else
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    if dry; then
        echo "git ls-files -z | tar --null --files-from - -c | tar -xC $folder"
    else
        tracked_files | tar --null --files-from - -c | tar -xC "$folder"
    fi
    words+=("--base-docker-image=${option[base-image]}" "--script-dir=$folder")
fi
# xpk restarts by itself what ends with 42 or 127 to 255; 1 and 2 are a crash and an error of vlmem
run xpk workload create "--cluster=${option[cluster]}" "--workload=${option[name]}" "--tpu-type=${option[type]}" \
    "--num-slices=${option[slices]}" "--max-restarts=${option[max-restarts]}" --restart-on-exit-codes=1,2 \
    "--termination-grace-period-seconds=${option[grace]}" "${words[@]}" "--command=$(in_the_pod)"

#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: writes a batch script and submits it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: launch/slurm.sh [options] --config FILE --workdir FOLDER [--config.key=value ...] [-- words]

Submits a job that starts `vlmem train --multihost` with srun, on every node. Before the time limit the processes save,
and the job goes back into the queue. After a failure they are started again in the same allocation. The repository and
the folder of results must lie on a file system that all nodes share.

  --nodes N                  (default 1)
  --gpus-per-node N          (default 8)
  --processes-per-node N     one for each GPU (default), or 1
  --cpus-per-process N       for decoding images (default: as the cluster decides)
  --time LIMIT               as sbatch takes it, such as 24:00:00
  --partition, --account, --qos NAME
  --sbatch="WORDS"           more options of sbatch, such as --sbatch="--exclusive --mem=0"
  --name NAME                (default vlmem)
  --grace SECONDS            for saving before the time limit (default 300)
  --compile-cache FOLDER     keeps compiled programs for later starts
  --max-restarts N           starts after a failure (default 3)
  --dry-run                  print the batch script, submit nothing

example:
  launch/slurm.sh --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu \
      --config configs/comemo_2b.py --workdir /shared/runs/comemo --config.seed=3

scancel --batch --signal=USR2 JOB saves and ends the job; plain scancel may kill it before it has saved. The same command
goes on from the last checkpoint.
END
}

option[nodes]=1 option[gpus-per-node]=8 option[processes-per-node]="" option[cpus-per-process]="" option[time]=""
option[partition]="" option[account]="" option[qos]="" option[sbatch]="" option[name]=vlmem option[grace]=300
option[compile-cache]=""
read_options "$@"
need_experiment
need_number nodes 1
need_number gpus-per-node 1
need_number grace 1
: "${option[processes-per-node]:=${option[gpus-per-node]}}"
gpus=${option[gpus-per-node]} processes=${option[processes-per-node]}
[ "$processes" = "$gpus" ] || [ "$processes" = 1 ] ||
    fail "--processes-per-node must be 1 or --gpus-per-node ($gpus), got $processes"
need_command sbatch "run this where jobs are submitted"

directives() {
    local name
    echo "#SBATCH --job-name=${option[name]}"
    echo "#SBATCH --output=${option[name]}-%j.log"
    echo "#SBATCH --open-mode=append"
    echo "#SBATCH --nodes=${option[nodes]}"
    echo "#SBATCH --ntasks-per-node=$processes"
    echo "#SBATCH --gpus-per-node=$gpus"
    [ -z "${option[cpus-per-process]}" ] || echo "#SBATCH --cpus-per-task=${option[cpus-per-process]}"
    for name in time partition account qos; do
        [ -z "${option[$name]}" ] || echo "#SBATCH --$name=${option[$name]}"
    done
    for name in ${option[sbatch]}; do echo "#SBATCH $name"; done
    echo "#SBATCH --requeue"
    # USR1 comes from the time limit alone, so that scancel does not send the job back into the queue
    echo "#SBATCH --signal=B:USR1@${option[grace]}"
}

environment() {
    export_cache ""
    # JAX gives each process of a SLURM job one GPU, unless told otherwise
    [ "$processes" = "$gpus" ] || echo "export JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1)))"
}

batch_script() {
    cat <<END
#!/usr/bin/env bash
$(directives)
set -euo pipefail
cd $(quote "$PWD")
source launch/common.sh
option[max-restarts]=${option[max-restarts]}
command -v vlmem >/dev/null || prepare cuda
$(environment)

# USR1 (the time limit) and USR2 (scancel --batch --signal=USR2) reach this shell alone. Signals for the processes go
# through scancel: srun answers SIGTERM by killing them.
requeue="" signalled=""
save() {
    signalled=1 stopping=1
    scancel --signal=TERM "\$SLURM_JOB_ID" || true
}
trap 'requeue=1; save' USR1
trap save USR2
trap 'signalled=1 stopping=1' TERM

start() {
    local code steps
    srun --kill-on-bad-exit=1${option[cpus-per-process]:+ --cpus-per-task=${option[cpus-per-process]}} \\
        vlmem train --multihost $(quote "${train[@]}") &
    steps=\$!
    while true; do
        signalled="" code=0
        wait "\$steps" || code=\$?
        [ -n "\$signalled" ] || return "\$code"
    done
}

code=0
with_restarts start || code=\$?
[ -z "\$requeue" ] || scontrol requeue "\$SLURM_JOB_ID"
exit "\$code"
END
}

if dry; then batch_script; else batch_script | sbatch; fi

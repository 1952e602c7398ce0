#!/usr/bin/env bash
# A merge in one allocation: the scheduler and the driver on its first node, a worker for every task.
#
#   sbatch --nodes 4 deploy/slurm/driver.sh recipe.yml /shared/merged --shard-size 5GB
#
# The recipe, the models and the output must be on a file system that all nodes see, or in object storage. The same
# command again goes on where a job was stopped. `python` must be one that has mergemill: activate it before sbatch.
# MERGEMILL_MEMORY is promised by each worker (3GiB); it is a gigabyte less than what a task of the job gets.
#SBATCH --job-name=mergemill
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch driver.sh RECIPE OUT [options of mergemill merge]" >&2
    exit 2
fi
memory=${MERGEMILL_MEMORY:-3GiB}

# What `mergemill status` says of how to go on: the same sbatch, with its options as far as SLURM tells them to a job.
say_again() {
    local option variable time command script=$0
    read -r time command < <(squeue --noheader --jobs "${SLURM_JOB_ID:-0}" --format='%l %o' 2>/dev/null) || true
    if [[ $command == *" $*" ]]; then
        script=${command%" $*"} # $0 is a copy that is gone with the job
    fi
    printf 'cd %q && MERGEMILL_MEMORY=%q sbatch' "${SLURM_SUBMIT_DIR:-$PWD}" "$memory"
    for option in account=SLURM_JOB_ACCOUNT partition=SLURM_JOB_PARTITION nodes=SLURM_JOB_NUM_NODES \
        ntasks-per-node=SLURM_NTASKS_PER_NODE cpus-per-task=SLURM_CPUS_PER_TASK \
        mem-per-cpu=SLURM_MEM_PER_CPU mem=SLURM_MEM_PER_NODE gpus-per-task=SLURM_GPUS_PER_TASK; do
        variable=${option#*=}
        [ -z "${!variable:-}" ] || printf ' --%s=%q' "${option%=*}" "${!variable}"
    done
    printf ' %q' ${time:+"--time=$time"} "$script" "$@"
}

MERGEMILL_RESUME=$(say_again "$@")
export MERGEMILL_RESUME
recipe=$1
out=$2
shift 2
folder=${SLURM_SUBMIT_DIR:-$PWD}/.mergemill-${SLURM_CLUSTER_NAME:-slurm}-${SLURM_JOB_ID:-0} # where all nodes see it
file=$folder/scheduler.json
scratch=${TMPDIR:-/tmp}
scheduler=
workers=

# shellcheck disable=SC2329 # it is called, by the trap
finish() {
    rm -rf "$folder" # first, since SLURM may not wait for the rest
    # The tasks are asked to end: where srun is, they are killed, and leave their folders.
    scancel --signal=TERM "${SLURM_JOB_ID:-0}.0" 2>/dev/null || true
    for _ in {1..150}; do
        kill -0 "$workers" 2>/dev/null || break
        sleep 0.2
    done
    kill "$workers" "$scheduler" 2>/dev/null || true
    wait "$workers" "$scheduler" 2>/dev/null || true
}
trap 'finish' EXIT

rm -rf "$folder" # of a run of this job that was killed
mkdir -m 700 "$folder"
python -m distributed.cli.dask_scheduler --scheduler-file "$file" --port 0 --no-dashboard &
scheduler=$!
cpus=${SLURM_CPUS_PER_TASK:-1}
srun --cpus-per-task "$cpus" python -m distributed.cli.dask_worker --scheduler-file "$file" --nthreads "$cpus" \
    --memory-limit 0 --local-directory "$scratch" --no-dashboard &
workers=$!

until [ -s "$file" ]; do
    kill -0 "$scheduler"
    sleep 1
done

# In the background, so that the end of the job's time (SIGTERM, two minutes before) stops it as Ctrl-C would.
mergemill merge "$recipe" "$out" --scheduler "$file" --memory "$memory" "$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # `wait` ends with the signal, not with the driver
    code=0
    wait "$driver" || code=$?
done
exit "$code"

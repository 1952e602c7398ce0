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
    echo "usage: sbatch $0 RECIPE OUT [options of mergemill merge]" >&2
    exit 2
fi
recipe=$1
out=$2
shift 2
memory=${MERGEMILL_MEMORY:-3GiB}
folder=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.mergemill-${SLURM_JOB_ID:-0}-XXXXXX") # where all nodes see it
file=$folder/scheduler.json
scratch=${TMPDIR:-/tmp}

running=()
# shellcheck disable=SC2329 # it is called, by the trap
finish() {
    if [ ${#running[@]} -gt 0 ]; then
        kill "${running[@]}" 2>/dev/null || true
        wait "${running[@]}" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap 'finish' EXIT

python -m distributed.cli.dask_scheduler --scheduler-file "$file" --port 0 --no-dashboard &
running+=($!)
srun python -m distributed.cli.dask_worker --scheduler-file "$file" --nthreads "${SLURM_CPUS_PER_TASK:-1}" \
    --memory-limit 0 --local-directory "$scratch" --no-dashboard &
running+=($!)

until [ -s "$file" ]; do
    kill -0 "${running[0]}" # the scheduler is there
    sleep 1
done

# In the background, so that the end of the job's time (SIGTERM, two minutes before) stops it as Ctrl-C would.
mergemill merge "$recipe" "$out" --scheduler "$file" --memory "$memory" "$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
if kill -0 "$driver" 2>/dev/null; then # `wait` ends with the signal, not with the driver
    code=0
    wait "$driver" || code=$?
fi
exit "$code"

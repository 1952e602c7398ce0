#!/bin/sh
# What a container of the image is: `scheduler …`, `worker …` (options of `dask scheduler` and `dask worker`), `python …`,
# or a command of mergemill. dask-kubernetes starts `dask worker …`, and by its old name, which Dask has no more,
# `dask-scheduler …`.
set -eu
case ${1:-} in
    scheduler | worker) exec dask "$@" ;;
    dask-*)
        command=${1#dask-}
        shift
        exec dask "$command" "$@"
        ;;
    dask | python) exec "$@" ;;
    *) exec mergemill "$@" ;;
esac

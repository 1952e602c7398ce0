#!/bin/sh
# What a container of the image is: `scheduler …`, `worker …` (options of `dask scheduler` and `dask worker`), `python …`,
# or a command of mergemill.
set -eu
case ${1:-} in
    scheduler | worker) exec dask "$@" ;;
    python) exec "$@" ;;
    *) exec mergemill "$@" ;;
esac

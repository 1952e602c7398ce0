"""From a recipe file to a checkpoint in one call."""

from collections.abc import Sequence
from pathlib import Path

from mergemill.engine.methods.own import GivenMethods
from mergemill.engine.plan.draft import SHARD_SIZE
from mergemill.engine.plan.make import make_plan
from mergemill.engine.recipe import ClusterFile, GivenRecipe, load_cluster
from mergemill.engine.runs.drive import run
from mergemill.engine.runs.events import Committed, OnEvent, ignore
from mergemill.engine.runs.worker.workers import DEVICE_MEMORY


def merge(
    recipe: GivenRecipe,
    out: str | Path,
    *,
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    methods: Sequence[GivenMethods] = (),
    workers: int | None = None,
    threads: int | None = None,
    memory: str | int | None = None,
    scheduler: str | None = None,
    cluster: str | Path | ClusterFile | None = None,
    device: str | None = None,
    device_memory: str | int = DEVICE_MEMORY,
    cache: str | int | None = None,
    cache_folder: str | Path | None = None,
    public: bool = False,
    progress: bool = False,
    on_event: OnEvent = ignore,
) -> Committed:
    """Merge what `recipe` (a value, a path, a mapping or YAML text) describes into the folder `out`.

    The parameters are those of `make_plan` and `run`, and so are the errors.
    """
    file = cluster if cluster is None or isinstance(cluster, ClusterFile) else load_cluster(cluster)
    plan = make_plan(recipe, seed=seed, shard_size=shard_size, methods=methods, storage=file.storage if file else {})
    return run(
        plan,
        out,
        workers=workers,
        threads=threads,
        memory=memory,
        scheduler=scheduler,
        cluster=file,
        device=device,
        device_memory=device_memory,
        cache=cache,
        cache_folder=cache_folder,
        public=public,
        progress=progress,
        on_event=on_event,
    )

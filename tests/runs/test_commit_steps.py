"""A commit into object storage may end before any of its steps: what is there then is the whole model, or refused."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import INDEX, STATE, new_place, without_state
from runs.buckets import Place as Prefix
from runs.merging import Killed, hash_output, plan_merge, write_family
from runs.test_whole_shards import Place, make_place

from mergemill.engine import abort, inspect, run
from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.errors import CheckpointError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.remote import RemoteOutput
from mergemill.engine.storage import streams
from mergemill.engine.storage.any_objects import AnyObjects
from mergemill.engine.storage.multipart import S3Objects

STEPS = ((S3Objects, "complete_upload"), (S3Objects, "put"), (streams, "rename"), (AnyObjects, "put"))
LAST = 3  # plan and driver that tell no more where, and the mark


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    family = write_family(tmp_path_factory.mktemp("small"), vocab=256, hidden=64, layers=1)
    plan = plan_merge("linear", family, part_bytes=5 << 20, shard_size="100KB")
    assert len(plan.shards) > 2
    return plan


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    run_here(plan, str(out))
    return hash_output(out)


def run_here(plan: Plan, url: str) -> Any:
    return run(plan, url, workers=0, threads=1)


@contextmanager
def dying_in_commit(step: int) -> Iterator[Counter[str]]:
    """Raise `Killed` instead of taking a step of the commit; gives how often each kind of step was taken."""
    done: Counter[str] = Counter()

    def guard(patch: pytest.MonkeyPatch, target: Any, name: str) -> None:
        function = getattr(target, name)

        def guarded(*args: Any, **options: Any) -> Any:
            if str(args[1]).endswith("/lock"):  # the lease is renewed by a clock
                return function(*args, **options)
            if done.total() == step:
                raise Killed
            done[name] += 1
            return function(*args, **options)

        patch.setattr(target, name, guarded)

    begin = RemoteOutput._begin_commit
    with pytest.MonkeyPatch.context() as patch:

        def begin_guarded(self: Any, plan: Plan) -> None:
            begin(self, plan)
            for target, name in STEPS:
                guard(patch, target, name)

        patch.setattr(RemoteOutput, "_begin_commit", begin_guarded)
        with pytest.raises(Killed):
            yield done


def count_steps(plan: Plan, url: str) -> int:
    """Return how many steps a commit has: shards get their names where they have none, files are written, the mark."""
    shards = 0 if url.startswith("memory") else len(plan.shards)
    return shards + len(plan.files) + LAST


def check_whole_or_refused(place: Place | Prefix, plan: Plan, folder: Path) -> None:
    """A reader refuses what is not finished; one to whom the notes are not shown takes the whole model, or nothing."""
    shown = without_state(place.read())
    nothing = not shown and place.url.startswith("s3://")  # where a prefix is what lies directly below it
    why = "no such object" if nothing else "holds a merge that is not finished; run the same merge again"
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(place.url)
    for name, data in shown.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(exist_ok=True)
    try:
        found = open_checkpoint(str(folder))
    except CheckpointError:
        assert INDEX not in place.sizes()
    else:
        assert len(found.tensors) == plan.tensors


def walk(places: Iterator[Place | Prefix], plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    """End a commit before each of its steps; give up what every third left, and finish the others."""
    first = next(places)
    steps = count_steps(plan, first.url)
    for step in range(steps):
        place = first if step == 0 else next(places)
        with dying_in_commit(step) as done:
            run_here(plan, place.url)
        assert done.total() == step
        assert (INDEX in place.sizes()) == (step >= steps - LAST), "the index is the last of the model"
        assert inspect(place.url).state.startswith("unfinished")
        check_whole_or_refused(place, plan, tmp_path / f"shown-{step}")
        if step % 3 == 0:
            abort(place.url)
            assert place.sizes() == {}
        else:
            assert run_here(plan, place.url).redone_parts == 0
            assert place.hash() == expected
            assert not any(name.startswith(f"{STATE}lock") for name in place.sizes())
            assert len(open_checkpoint(place.url).tensors) == plan.tensors


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_commit_may_end_before_any_of_its_steps(
    kind: str, plan: Plan, expected: dict[str, str], tmp_path: Path
) -> None:
    walk(iter(lambda: make_place(kind, tmp_path), None), plan, expected, tmp_path)


def test_so_may_one_in_s3(seaweed: Any, plan: Plan, expected: dict[str, str], tmp_path: Path) -> None:
    walk(iter(lambda: new_place(seaweed), None), plan, expected, tmp_path)

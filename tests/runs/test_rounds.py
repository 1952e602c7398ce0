"""The rounds of cut tensors: as many tasks as nearly every tensor needs, and one for the rest."""

from collections import Counter
from pathlib import Path

import pytest
from runs.merging import hash_output, plan_merge, write_family

from mergemill.engine import run
from mergemill.engine.runs.graph import make_tasks
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.tensors import select
from mergemill.engine.tensors.windows import Window

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(("method", "rounds", "rest"), [("ties", 3, 1), ("slerp", 1, 0), ("task_arithmetic", 0, 0)])
def test_a_cut_tensor_has_a_task_a_piece_for_each_usual_round_and_one_for_the_rest(
    method: str, rounds: int, rest: int, family: Path, tmp_path: Path
) -> None:
    plan = plan_merge(method, family)
    pieces = sum(piece.tensor.name == EMBEDDING for part in plan.parts for piece in part.pieces)
    assert pieces > 2
    tasks = make_tasks(plan, plan.parts, find_output(tmp_path / "out").targets(plan), token="t")
    keys = {str(key) for task in tasks for key in task.__dask_graph__()}
    kinds = Counter(key.split("-")[2] for key in keys if key.startswith(f"gather-{EMBEDDING}-"))
    assert kinds == Counter({f"round{number}": pieces for number in range(rounds)} | ({"rest": 1} if rest else {}))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tensor_that_needs_more_rounds_has_the_same_bytes(
    workers: int, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge("ties", family)
    run(plan, tmp_path / "usual", workers=workers)
    with monkeypatch.context() as patched:  # in this process alone: on others it is the usual way
        patched.setattr(select, "choose_window", lambda sample, rank, size, most: Window(most - 1, most))
        run(plan, tmp_path / "more", workers=0)
    assert hash_output(tmp_path / "more") == hash_output(tmp_path / "usual")

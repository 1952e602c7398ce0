"""Files that are only copied and large go into every kind of output as they are, and are never whole in memory."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import new_place
from runs.merging import Killed, hash_output, plan_merge, write_family
from runs.test_whole_shards import Place, elsewhere, make_place, place
from servers.s3 import S3

from mergemill.engine import abort, run, verify
from mergemill.engine.errors import OutputError, SourceChanged
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Event, PartFinished
from mergemill.engine.runs.outputs import record
from mergemill.engine.storage.any_objects import AnyObjects
from mergemill.engine.storage.copied import Copied
from mergemill.engine.storage.multipart import S3Objects
from mergemill.engine.storage.objects import Objects
from mergemill.engine.storage.ranges import PIECE_BYTES, pin_file
from mergemill.engine.storage.store import ENVIRONMENT
from mergemill.engine.storage.streams import BESIDE_BYTES

__all__ = ["elsewhere", "place"]  # fixtures

LARGE = "spiece.model"
SIZE = 3 * PIECE_BYTES + 12_345


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models of which the donor has a large tokenizer."""
    family = write_family(tmp_path / "models", vocab=256, hidden=64, layers=1)
    (family / "A" / LARGE).write_bytes(make_data(SIZE))
    return family


@pytest.fixture
def plan(models: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A merge that copies it, and for which it is large."""
    monkeypatch.setattr(record, "JOINED_BYTES", PIECE_BYTES)
    plan = plan_merge("linear", models, part_bytes=5 << 20, shard_size="100KB")
    assert LARGE in [file.name for file in plan.files if file.copied]
    return plan


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, str]:
    """The hashes of the same merge in a folder."""
    run_here(plan, tmp_path / "expected")
    return hash_output(tmp_path / "expected")


def make_data(size_bytes: int) -> bytes:
    """Return bytes no two pieces of which are alike."""
    return b"".join(number.to_bytes(8, "little") for number in range(-(-size_bytes // 8)))[:size_bytes]


def run_here(plan: Plan, out: str | Path, **options: Any) -> None:
    run(plan, out, workers=0, threads=1, **options)


@contextmanager
def ending_at(put: str, place: type[Any]) -> Iterator[None]:
    """End the merge, as if killed, after the large file is written."""
    with pytest.MonkeyPatch.context() as patch:
        function = getattr(place, put)

        def end(self: Any, url: str, *args: Any, **options: Any) -> bool:
            assert function(self, url, *args, **options)
            if url.endswith(LARGE):
                raise Killed
            return True

        patch.setattr(place, put, end)
        with pytest.raises(Killed):
            yield


def test_it_is_in_s3_as_it_is(s3: S3, plan: Plan, expected: dict[str, str]) -> None:
    out = new_place(s3)
    with ending_at("put", S3Objects):
        run_here(plan, out.url)
    run_here(plan, out.url)  # it is there already, and known for ours
    assert out.hash() == expected
    assert out.uploads() == {}
    assert verify(out.url).parts == len(plan.parts)


def test_it_is_in_any_store_as_it_is(place: Place, plan: Plan, expected: dict[str, str]) -> None:
    with ending_at("put", AnyObjects):
        run_here(plan, place.url)
    run_here(plan, place.url)
    assert place.hash() == expected
    assert place.unfinished() == []
    assert verify(place.url).parts == len(plan.parts)


def test_abort_takes_it_back(s3: S3, plan: Plan, tmp_path: Path) -> None:
    near = make_place("local", tmp_path)
    for out, kind in ((new_place(s3), S3Objects), (near, AnyObjects)):
        with ending_at("put", kind):
            run_here(plan, out.url)
        assert out.sizes()[LARGE] == SIZE
        abort(out.url)
        assert out.sizes() == {}


@pytest.mark.parametrize("data", [b"mine", make_data(SIZE - 1) + b"?"], ids=["of another size", "of the same size"])
def test_another_one_that_appears_is_left_alone(data: bytes, s3: S3, plan: Plan, tmp_path: Path) -> None:
    for out in (new_place(s3), make_place("local", tmp_path), make_place("memory", tmp_path)):

        def appear(event: Event, out: Any = out) -> None:
            if isinstance(event, PartFinished) and event.parts_done == 1:
                out.put(LARGE, data)

        with pytest.raises(OutputError, match=r"spiece\.model: appeared while the merge ran"):
            run_here(plan, out.url, on_event=appear)
        abort(out.url)
        assert out.read() == {LARGE: data}


def test_one_that_changes_after_the_plan_ends_the_merge(s3: S3, plan: Plan, models: Path, tmp_path: Path) -> None:
    outs = [new_place(s3), make_place("local", tmp_path)]

    def change(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            (models / "A" / LARGE).write_bytes(make_data(SIZE)[::-1])

    for out in outs:
        (models / "A" / LARGE).write_bytes(make_data(SIZE))
        again = plan_merge("linear", models, part_bytes=5 << 20, shard_size="100KB")
        with pytest.raises(SourceChanged, match=r"spiece\.model"):
            run_here(again, out.url, on_event=change)
        assert LARGE not in out.sizes()


@pytest.mark.parametrize("when", ["before", "while it is sent"])
def test_one_that_changes_while_it_is_sent_is_told_of_at_once(when: str, s3: S3, tmp_path: Path) -> None:
    path = tmp_path / LARGE
    path.write_bytes(make_data(SIZE))
    copied = Copied(pin_file(path), ENVIRONMENT)
    out = new_place(s3)
    with pytest.MonkeyPatch.context() as patch:
        if when == "before":
            path.write_bytes(b"another")
        else:
            patch.setattr("mergemill.engine.storage.copied.check_pin", lambda *_: path.write_bytes(b"another"))
        with pytest.raises(SourceChanged):
            S3Objects().put(f"{out.url}/{LARGE}", copied, absent=True)
    assert out.sizes() == {}


def measure(put: Callable[[], bool]) -> int:
    """Return the most bytes that were allocated at once."""
    tracemalloc.start()
    try:
        assert put()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("elsewhere")
def test_it_is_never_whole_in_memory(s3: S3, tmp_path: Path) -> None:
    path = tmp_path / LARGE
    path.write_bytes(bytes(96 << 20))
    copied = Copied(pin_file(path), ENVIRONMENT)
    for out in (new_place(s3), make_place("local", tmp_path), make_place("elsewhere", tmp_path)):
        is_s3 = out.url.startswith("s3:")
        objects: Objects = S3Objects() if is_s3 else AnyObjects(f"{out.url}/.mergemill", ENVIRONMENT)
        objects.put(f"{out.url}/first", b"connected")
        url = f"{out.url}/{LARGE}"
        peak = measure(lambda url=url, objects=objects: objects.put(url, copied, absent=True))
        assert peak < BESIDE_BYTES + 3 * PIECE_BYTES < copied.size_bytes // 2
        assert not is_s3 or peak < 4 * PIECE_BYTES
        assert out.sizes()[LARGE] == copied.size_bytes

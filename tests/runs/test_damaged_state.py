"""State beside an output that is damaged: resumed from what can be trusted, or one error; what is ours is aborted."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runs.buckets import Place as Prefix
from runs.buckets import new_place
from runs.merging import Killed, hash_output, is_loadable, plan_merge, run_until, write_family
from runs.test_whole_shards import Place, make_place
from servers.s3 import S3

from mergemill.engine import abort, cancel, inspect, run, status, verify
from mergemill.engine.errors import MergemillError, OutputError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.attach import attach
from mergemill.engine.runs.events import Event, PartFinished, Started
from mergemill.engine.runs.outputs import object_journal
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.lease import find_start

JOURNAL, RECORD, DRIVER = "journal.jsonl", "plan.json", "driver.json"
fuzzed = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    family = write_family(tmp_path_factory.mktemp("small"), vocab=256, hidden=64, layers=2)
    plan = plan_merge("linear", family, part_bytes=1 << 15, shard_size="100KB")
    assert len(plan.parts) > 8
    assert len(plan.shards) > 3
    return plan


@pytest.fixture(scope="module")
def expected(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan, out, workers=0, threads=1)
    return out


@pytest.fixture(scope="module")
def half(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "out"
    run_until(plan, out, 6)
    return out


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Draw a way to damage a file: cut, overwritten, replaced, or of JSON with other values."""
    kind = draw(st.sampled_from(["cut", "overwritten", "replaced", "appended", "retyped"]))
    place, data, value = draw(st.floats(0, 1)), draw(st.binary(max_size=30)), draw(VALUES)
    if kind == "retyped":
        return lambda text: b"\n".join(retype(line, place, value) for line in split(text))
    if kind == "replaced":
        return lambda text: draw_json(value) if data[:1] < b"\x80" else data
    if kind == "appended":
        return lambda text: text + data
    return lambda text: (
        text[: int(place * len(text))] + (b"" if kind == "cut" else data + text[int(place * len(text)) + len(data) :])
    )


def draw_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def split(text: bytes) -> list[bytes]:
    """Return the values of JSON in a file: its lines, or all of it."""
    return text.split(b"\n") if text.startswith(b'{"part"') else [text]


def retype(line: bytes, place: float, value: Any) -> bytes:
    """Replace one of the values of an object, or one within one of those."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    keys = sorted(found)
    key = keys[min(int(place * len(keys)), len(keys) - 1)]
    inner = found[key]
    if isinstance(inner, dict) and inner and place > 0.5:
        inner[min(inner)] = value
    elif isinstance(inner, list) and inner and place > 0.3:
        inner[0] = value
    else:
        found[key] = value
    return json.dumps(found).encode()


def copy(half: Path, name: str, damage: Callable[[bytes], bytes]) -> Path:
    """Return a copy of an output with one of its notes damaged."""
    out = half.parent / "copy"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(half, out)
    path = out / ".mergemill" / name
    path.write_bytes(damage(path.read_bytes()))
    return out


def try_all(out: Path, *commands: Callable[..., Any]) -> None:
    """Use commands on an output: what they cannot do is an error that was foreseen."""
    for command in commands:
        with suppress(MergemillError):
            command(out)


LOOKS = (status, inspect, lambda out: cancel(out, wait_s=0), attach)


@fuzzed
@given(damage=damages())
@example(damage=lambda text: text + b"\xff\xfe\x80")
@example(damage=lambda text: DEEP + b"\n" + text)
@example(damage=lambda text: b"")
@example(damage=lambda text: text.replace(b'"part": 1,', b'"part": 1000000,'))
@example(damage=lambda text: text.replace(b'"drifts": [[', b'"drifts": [[null, '))
def test_a_damaged_journal_is_resumed_from_the_receipts_that_are_sound(
    damage: Callable[[bytes], bytes], plan: Plan, half: Path, expected: Path
) -> None:
    out = copy(half, JOURNAL, damage)
    try_all(out, *LOOKS)
    run(plan, out, workers=0, threads=1)
    assert hash_output(out) == hash_output(expected)
    assert verify(out).parts == len(plan.parts)


@fuzzed
@given(damage=damages())
@example(damage=lambda text: b"")
@example(damage=lambda text: DEEP)
@example(damage=lambda text: text.replace(b'"size_bytes": ', b'"size_bytes": -'))
def test_a_damaged_plan_is_an_error_that_says_what_to_do_and_what_is_ours_is_aborted(
    damage: Callable[[bytes], bytes], plan: Plan, half: Path, expected: Path
) -> None:
    out = copy(half, RECORD, damage)
    try_all(out, *LOOKS, verify)
    try:
        run(plan, out, workers=0, threads=1)
    except OutputError as error:
        assert "mergemill abort" in str(error)  # noqa: PT017
        (out / "notes.txt").write_bytes(b"mine")
        abort(out)
        assert [path.name for path in out.iterdir()] == ["notes.txt"]
    else:
        assert hash_output(out) == hash_output(expected)


@fuzzed
@given(damage=damages())
@example(damage=lambda text: b"\xff")
@example(damage=lambda text: DEEP)
@example(damage=lambda text: text.replace(b'"since": ', b'"since": 1e300, "x": '))
def test_a_damaged_note_of_a_driver_is_none(
    damage: Callable[[bytes], bytes], plan: Plan, half: Path, expected: Path
) -> None:
    out = copy(half, DRIVER, damage)
    try_all(out, *LOOKS)
    run(plan, out, workers=0, threads=1)
    assert hash_output(out) == hash_output(expected)


@fuzzed
@given(damage=damages(), name=st.sampled_from([RECORD, JOURNAL, DRIVER]))
def test_a_finished_merge_with_damaged_state_is_told_of_in_a_line(
    damage: Callable[[bytes], bytes], name: str, plan: Plan, expected: Path
) -> None:
    before = hash_output(expected)
    out = copy(expected, name, damage)
    try_all(out, *LOOKS, verify)
    assert hash_output(out) == before


@pytest.mark.parametrize("data", [b"", b"\xff", DEEP, b"[]", b'{"token": 1, "by": []}', b'"x"'])
def test_a_damaged_request_to_end_ends_nothing(data: bytes, plan: Plan, tmp_path: Path) -> None:
    def damage(event: Event) -> None:
        if isinstance(event, Started):
            (tmp_path / "out" / ".mergemill" / "cancel").write_bytes(data)

    run(plan, tmp_path / "out", workers=0, threads=1, on_event=damage)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", DEEP, b"[]", b'{"pid": "../1", "processes": 3}', b'{"pid": "\\u0000", "host": []}']
)
def test_a_damaged_lease_is_somebody_elses_until_it_is_old(data: bytes, plan: Plan, tmp_path: Path) -> None:
    place = make_place("memory", tmp_path)
    place.put(".mergemill/lock", data)
    with pytest.raises(OutputError, match="another mergemill is writing here"):
        run(plan, place.url, workers=0)


@pytest.mark.parametrize("process", ["1/../1", "\0", None, [], 1.0])
def test_what_is_no_number_is_no_process(process: object) -> None:
    assert find_start(process) is None


# --- state that is removed in mid-run ---


def remove_at(path: Path, part: int) -> Callable[[Event], None]:
    """Return what removes a file or folder after so many parts."""

    def remove(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == part:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("name", [JOURNAL, RECORD, "lock", ""])
def test_state_that_is_removed_in_mid_run_is_noticed(name: str, when: str, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    removed = out / ".mergemill" / name
    with pytest.raises(RunError, match=r"\.mergemill/.*(is gone|was removed|has lost|No such file)"):
        run(
            plan,
            out,
            workers=0,
            threads=1,
            on_event=remove_at(removed, 2 if when == "early" else len(plan.parts)),
        )
    assert not is_loadable(out)
    shutil.rmtree(out / ".mergemill", ignore_errors=True)


def test_receipts_that_are_cut_off_in_mid_run_are_noticed(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def cut(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            (out / ".mergemill" / JOURNAL).write_bytes(b"")

    with pytest.raises(RunError, match=f"has lost the receipts of 3 of {len(plan.parts)} parts while the merge ran"):
        run(plan, out, workers=0, threads=1, on_event=cut)
    assert not is_loadable(out)
    committed = run(plan, out, workers=0, threads=1)
    assert committed.redone_parts == 3
    assert verify(out).parts == len(plan.parts)


def test_a_shard_that_is_removed_before_the_commit_is_noticed(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lost = FolderOutput(out).unfinished(plan.shards[1].name, plan.digest)
    with pytest.raises(RunError, match=r"model-00002-of-.*: was removed or replaced while the merge ran"):
        run(plan, out, workers=0, threads=1, on_event=remove_at(lost, len(plan.parts)))
    assert not is_loadable(out)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request.param, tmp_path)


@pytest.mark.parametrize("name", ["journal/", RECORD])
def test_objects_of_state_that_are_removed_in_mid_run_are_noticed(
    name: str, plan: Plan, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_journal, "FLUSH_S", 0.0)

    def remove(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            for found in [found for found in place.sizes() if found.startswith(f".mergemill/{name}")]:
                place.delete(found)

    with pytest.raises(RunError, match=r"\.mergemill/.* was removed or replaced while the merge ran"):
        run(plan, place.url, workers=0, threads=1, on_event=remove)
    assert "model.safetensors.index.json" not in place.sizes()


def test_objects_without_their_plan_are_not_taken_up(plan: Plan, place: Place) -> None:
    leave_half(plan, place)
    place.delete(f".mergemill/{RECORD}")
    with pytest.raises(OutputError, match=r"holds .*"):
        run(plan, place.url, workers=0)
    abort(place.url)
    assert not any(name.startswith(".mergemill/") for name in place.sizes())


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[]", b'{"digest": 1}'])
def test_objects_with_a_damaged_plan_are_aborted(data: bytes, plan: Plan, place: Place) -> None:
    leave_half(plan, place)
    place.put(f".mergemill/{RECORD}", data)
    place.put("notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"is damaged, or not of this version of mergemill: .* mergemill abort"):
        run(plan, place.url, workers=0)
    abort(place.url)
    left = place.sizes()
    assert "notes.txt" in left
    assert not any(name.startswith(".mergemill/") for name in left)


def test_a_prefix_with_anothers_state_is_neither_used_nor_emptied(plan: Plan, place: Place) -> None:
    place.put(".mergemill/thesis.tex", b"precious")
    for refused in (lambda: run(plan, place.url, workers=0), lambda: abort(place.url)):
        with pytest.raises(OutputError, match=r"holds 'thesis\.tex' and no plan of a merge"):
            refused()
    assert place.read() == {".mergemill/thesis.tex": b"precious"}


def leave_half(plan: Plan, place: Place | Prefix) -> None:
    """Run a plan and end as if killed after some parts, whose receipts are there."""

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 6:
            raise Killed

    with pytest.raises(Killed):
        run(plan, place.url, workers=0, threads=1, on_event=stop)


# --- objects of S3 ---


@pytest.fixture(scope="module")
def s3_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Shards of one part each, which S3 takes however small they are."""
    family = write_family(tmp_path_factory.mktemp("small"), vocab=256, hidden=64, layers=2)
    plan = plan_merge("linear", family, part_bytes=5 << 20, shard_size="100KB")
    assert len(plan.shards) > 3
    return plan


DAMAGED = [b"", b"\xff", b"{", b"[]", DEEP, b'{"digest": 1}']
UPLOADS = "uploads.json"


def leave_half_with_others(plan: Plan, out: Prefix) -> dict[str, str]:
    """Leave an unfinished merge and what is another's beside it; return the uploads that are not ours."""
    leave_half(plan, out)
    assert {f".mergemill/{name}" for name in (RECORD, UPLOADS)} <= out.sizes().keys()
    assert len(out.uploads()) == len(plan.shards)
    out.put("notes.txt", b"mine")
    out.put("data/large.safetensors", b"mine, too")
    return {out.start_upload(name): name for name in ("large.bin", "data/model-00001-of-00002.safetensors")}


def check_aborted(out: Prefix, others: dict[str, str]) -> None:
    """Give the merge up: nothing of it is left, and all of the others'."""
    abort(out.url)
    assert out.read() == {"notes.txt": b"mine", "data/large.safetensors": b"mine, too"}
    assert out.uploads() == others


@pytest.mark.parametrize("data", [*DAMAGED, b'{"large.bin": "x", "../b": "y"}'])
@pytest.mark.parametrize("names", [[RECORD], [UPLOADS], [RECORD, UPLOADS]], ids=["plan", "uploads", "both"])
def test_of_s3_with_a_damaged_plan_or_note_of_uploads_what_is_ours_is_aborted(
    names: list[str], data: bytes, s3: S3, s3_plan: Plan
) -> None:
    out = new_place(s3)
    others = leave_half_with_others(s3_plan, out)
    for name in names:
        out.put(f".mergemill/{name}", data)
    for look in LOOKS:
        with suppress(MergemillError):
            look(out.url)
    check_aborted(out, others)


@pytest.mark.parametrize("data", DAMAGED[1:])
def test_a_damaged_note_of_uploads_is_not_taken_up(data: bytes, s3: S3, s3_plan: Plan) -> None:
    out = new_place(s3)
    others = leave_half_with_others(s3_plan, out)
    out.put(f".mergemill/{UPLOADS}", data)
    before = out.uploads()
    with pytest.raises(OutputError, match=r"uploads\.json: is damaged, .* mergemill abort"):
        run(s3_plan, out.url, workers=0, threads=1)
    assert out.uploads() == before
    check_aborted(out, others)


def test_an_empty_note_of_uploads_is_none(s3: S3, s3_plan: Plan) -> None:
    out = new_place(s3)
    others = leave_half_with_others(s3_plan, out)
    out.put(f".mergemill/{UPLOADS}", b"")
    run(s3_plan, out.url, workers=0, threads=1)
    assert verify(out.url).parts == len(s3_plan.parts)
    assert out.uploads() == others

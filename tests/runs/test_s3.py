"""Merges from and to S3, on SeaweedFS and on moto: the bytes of a local merge, and every refusal one clear line."""

import functools
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import STATE, Place, found_by_environment, new_place, put_family, without_state
from runs.merging import Killed, hash_output, list_files, plan_merge, write_recipe
from servers.processes import find_free_ports
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import abort, inspect, make_plan, run, verify
from mergemill.engine.errors import MergemillError, OutputError, RunError, VerifyError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, Event, PartFinished
from mergemill.engine.runs.outputs import lease, object_journal
from mergemill.engine.runs.outputs.lease import Lease, hold_lease
from mergemill.engine.storage.multipart import S3Objects

PART = 5 << 20  # what S3 takes at least
SEVERAL = "700KB"  # shards of the small family, each of one part, which may be smaller

CASES: Mapping[str, dict[str, Any]] = {
    "streamed": {"method": "linear"},
    "ranked": {"method": "ties"},
    "two uploads a part": {"method": "linear", "part_bytes": 64 << 20},
    "several shards": {"method": "ties", "shard_size": "9MB"},
    "a shard a tensor": {"method": "linear", "shard_size": "tensor"},
}


def plan_case(case: str, models: Path | str) -> Plan:
    options = {"part_bytes": PART} | CASES[case]
    return plan_merge(options.pop("method"), models, **options)


@functools.cache
def merge_locally(case: str, family: Path) -> dict[str, bytes]:
    """Return the files of a merge from disk to disk."""
    out = family / f"merged: {case}"
    run(plan_case(case, family), out, workers=0, threads=2)
    return {name: data for name, data in list_files(out).items() if not name.startswith(STATE)}


def expect_from(models: Place, case: str, family: Path) -> dict[str, str]:
    """Return the hashes that the same merge must have when its models are read from S3, whose URLs it then names.

    Without the card: that names folders by their last name, and URLs whole.
    """
    files = merge_locally(case, family)
    named = {name: data.replace(str(family).encode(), models.url.encode()) for name, data in files.items()}
    assert {name for name in files if files[name] != named[name]} == {"recipe.yml"}
    return without_card(hash_all(named))


def without_card(hashes: Mapping[str, str]) -> dict[str, str]:
    return {name: found for name, found in hashes.items() if name != "README.md"}


def hash_all(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def run_here(plan: Plan, out: Path | str, **options: Any) -> Committed:
    return run(plan, out, **{"workers": 0, "threads": 2} | options)


def run_until(plan: Plan, out: Place, parts: int) -> None:
    """Run `plan` and end as if killed after `parts` receipts, all of which are in the storage."""

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == parts:
            raise Killed

    with suppress(Killed):
        run(plan, out.url, workers=0, threads=1, on_event=stop)
    assert inspect(out.url).state == f"unfinished: {parts} of {len(plan.parts)} parts"
    assert not out.is_loadable()


@contextmanager
def refused(kind: type[MergemillError], match: str) -> Iterator[None]:
    """Expect an error of one line, of exactly this kind."""
    with pytest.raises(MergemillError, match=match) as found:
        yield
    assert type(found.value) is kind
    assert "\n" not in str(found.value)


@pytest.fixture
def plan(family: Path) -> Plan:
    """Several shards of one part each."""
    plan = plan_merge("linear", family, part_bytes=PART, shard_size=SEVERAL)
    assert len(plan.shards) == len(plan.parts) > 5
    return plan


@functools.cache
def expected_of(family: Path) -> dict[str, str]:
    """The hashes of a local merge of `plan`."""
    out = family / "merged"
    run_here(plan_merge("linear", family, part_bytes=PART, shard_size=SEVERAL), out)
    return hash_output(out)


# --- the same bytes ---


def test_the_cases_differ_in_what_they_upload(large_family: Path) -> None:
    plans = {case: plan_case(case, large_family) for case in CASES}
    parts = {
        name: [sum(p.shard == i for p in plan.parts) for i in range(len(plan.shards))] for name, plan in plans.items()
    }
    assert parts["streamed"] == [3]
    assert parts["two uploads a part"] == [1]
    assert max(parts["several shards"]) > 1 < len(parts["several shards"])
    assert set(parts["a shard a tensor"]) == {0, 1}
    assert any(not piece.whole for part in plans["ranked"].parts for piece in part.pieces)
    shapes = {tensor.shape for tensor in inspect(large_family / "A").tensors}
    assert shapes >= {(), (0, 512)}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_from_s3_to_s3_has_the_bytes_of_a_local_one(case: str, s3: S3, large_family: Path) -> None:
    models, out = put_family(s3, large_family), new_place(s3)
    run_here(plan_case(case, models.url), out.url)
    assert without_card(out.hash()) == expect_from(models, case, large_family)
    assert out.uploads() == {}


def test_so_have_merges_from_disk_to_s3_and_from_s3_to_disk(s3: S3, large_family: Path, tmp_path: Path) -> None:
    case, models, out = "ranked", put_family(s3, large_family), new_place(s3)
    run_here(plan_case(case, large_family), out.url)
    assert out.hash() == hash_all(merge_locally(case, large_family))
    run_here(plan_case(case, models.url), tmp_path / "out")
    assert without_card(hash_output(tmp_path / "out")) == expect_from(models, case, large_family)
    assert models.url in (tmp_path / "out" / "README.md").read_text()


def test_so_have_merges_by_worker_processes(seaweed: S3, large_family: Path) -> None:
    models, out = put_family(seaweed, large_family), new_place(seaweed)
    committed = run(plan_case("several shards", models.url), out.url, workers=2)
    assert committed.redone_parts == committed.parts > 2
    assert without_card(out.hash()) == expect_from(models, "several shards", large_family)
    assert out.uploads() == {}


# --- what is there afterwards ---


def test_a_merge_in_s3_is_verified_and_replayed_from_s3(s3: S3, large_family: Path) -> None:
    models, out = put_family(s3, large_family), new_place(s3)
    plan = plan_case("ranked", models.url)
    run_here(plan, out.url)
    verified = verify(out.url, replay=2)
    assert (verified.parts, verified.replayed, verified.files) == (len(plan.parts), 2, len(plan.files))
    inspected = inspect(out.url)
    assert (inspected.kind, inspected.state) == ("merge", "finished")
    assert len(inspected.tensors) == plan.tensors
    name = plan.shards[0].name
    data = bytearray(out.read()[name])
    data[plan.parts[1].start_bytes + 1000] ^= 1
    out.put(name, bytes(data))
    with refused(VerifyError, f"{name}: bytes {plan.parts[1].start_bytes} to .* changed since they were written"):
        verify(out.url)
    out.delete("config.json")
    with refused(RunError, r"config\.json is gone; merge again with --overwrite"):
        run_here(plan, out.url)


def test_a_finished_merge_is_not_run_again(seaweed: S3, plan: Plan) -> None:
    out = new_place(seaweed)
    run_here(plan, out.url)
    before = out.read()
    again = run_here(plan, out.url)
    assert (again.parts, again.redone_parts, again.read_bytes, again.seconds) == (len(plan.parts), 0, 0, 0)
    assert out.read() == before


def test_another_merge_into_the_same_prefix_is_refused(seaweed: S3, plan: Plan, family: Path) -> None:
    out = new_place(seaweed)
    run_here(plan, out.url)
    before = out.read()
    with refused(OutputError, "holds another merge, which differs in the recipe"):
        run_here(plan_merge("slerp", family, part_bytes=PART), out.url)
    assert out.read() == before


def test_a_prefix_that_holds_something_else_is_refused(s3: S3, plan: Plan) -> None:
    out = new_place(s3)
    out.put("notes/today.txt", b"mine")
    out.put("z.txt", b"mine")
    with refused(OutputError, r"holds 'notes/today.txt' and 1 more; the output must be a prefix, new or empty"):
        run_here(plan, out.url)
    assert out.read() == {"notes/today.txt": b"mine", "z.txt": b"mine"}
    assert out.uploads() == {}


def test_a_prefix_that_only_begins_alike_is_another_place(seaweed: S3, plan: Plan) -> None:
    out = new_place(seaweed)
    beside = Place(seaweed, f"{out.prefix}-2")
    beside.put("notes.txt", b"mine")
    upload = beside.start_upload("large.bin")
    run_until(plan, out, 2)
    run_here(plan, out.url)
    assert beside.read() == {"notes.txt": b"mine"}
    assert list(beside.uploads()) == [upload]


@pytest.mark.parametrize("name", ["config.json", "shard"])
def test_an_object_that_appears_meanwhile_is_not_overwritten(name: str, s3: S3, plan: Plan, family: Path) -> None:
    out = new_place(s3)
    name = plan.shards[1].name if name == "shard" else name

    def put(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            out.put(name, b"mine")

    with refused(OutputError, f"{name}: appeared while the merge ran; move it away and run the merge again to finish"):
        run_here(plan, out.url, on_event=put)
    assert not out.is_loadable()
    assert out.read()[name] == b"mine"
    out.delete(name)
    assert run_here(plan, out.url).redone_parts == 0
    assert out.hash() == expected_of(family)


def test_a_tensor_without_elements_does_not_hide_an_object_of_the_shards_name(seaweed: S3, large_family: Path) -> None:
    """Its shard is a header, which is not uploaded in parts."""
    out, plan = new_place(seaweed), plan_case("a shard a tensor", large_family)
    (empty,) = {shard.name for shard in plan.shards} - {plan.shards[part.shard].name for part in plan.parts}

    def put(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 1:
            out.put(empty, b"mine")

    with refused(OutputError, f"{empty}: appeared while the merge ran"):
        run_here(plan, out.url, on_event=put)
    assert out.read()[empty] == b"mine"
    abort(out.url)
    assert without_state(out.read()) == {empty: b"mine"}


# --- resuming ---


def test_a_merge_is_resumed_from_what_is_in_s3_alone(
    s3: S3, plan: Plan, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = new_place(s3)
    run_until(plan, out, 4)
    assert list(tmp_path.iterdir()) == []
    assert len(out.uploads()) == len(plan.shards)
    committed = run_here(plan, out.url)
    assert committed.redone_parts == len(plan.parts) - 4
    assert out.hash() == expected_of(family)
    assert out.uploads() == {}
    assert verify(out.url).parts == len(plan.parts)


def test_parts_of_one_shard_are_resumed_one_by_one(seaweed: S3, large_family: Path) -> None:
    out, plan = new_place(seaweed), plan_case("streamed", large_family)
    run_until(plan, out, 2)
    assert run_here(plan, out.url).redone_parts == len(plan.parts) - 2
    assert out.hash() == hash_all(merge_locally("streamed", large_family))


def test_an_upload_that_is_gone_is_begun_again(seaweed: S3, plan: Plan, family: Path) -> None:
    """As a lifecycle rule of the bucket ends uploads after some days."""
    out = new_place(seaweed)
    run_until(plan, out, 4)
    lost = next(upload for upload, name in out.uploads().items() if out.parts(upload))
    out.end_upload(lost)
    assert run_here(plan, out.url).redone_parts == len(plan.parts) - 3
    assert out.hash() == expected_of(family)
    assert out.uploads() == {}


@pytest.fixture
def moto(moto_server: S3) -> Iterator[S3]:
    """moto, found by merges of this process through the environment."""
    with found_by_environment(moto_server):
        yield moto_server


def test_a_part_that_is_another_one_on_the_server_is_merged_again(moto: S3, plan: Plan, family: Path) -> None:
    out = new_place(moto)
    run_until(plan, out, 4)
    other = next(upload for upload in out.uploads() if out.parts(upload))
    out.replace_part(other, 1, b"somebody's")
    assert run_here(plan, out.url).redone_parts == len(plan.parts) - 3
    assert out.hash() == expected_of(family)


def test_a_part_lost_before_the_commit_is_said_and_mended_by_a_resume(moto: S3, plan: Plan, family: Path) -> None:
    out = new_place(moto)

    def replace(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            out.replace_part(next(iter(out.uploads())), 1, b"somebody's")

    with refused(RunError, r"safetensors: the server has lost part \d+; run the same merge again to resume"):
        run_here(plan, out.url, on_event=replace)
    assert not out.is_loadable()
    assert run_here(plan, out.url).redone_parts == 1
    assert out.hash() == expected_of(family)


def test_of_a_part_that_a_server_keeps_twice_ours_is_taken(seaweed: S3, plan: Plan, family: Path) -> None:
    out = new_place(seaweed)
    run_until(plan, out, 4)
    for upload in list(out.uploads()):
        out.replace_part(upload, 1, b"somebody's")
    run_here(plan, out.url)
    assert out.hash() == expected_of(family)


@pytest.mark.parametrize("step", ["complete_upload", "put", "append_commit"])
def test_a_commit_may_end_at_any_of_its_steps(
    step: str, seaweed: S3, plan: Plan, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_place(seaweed)
    with monkeypatch.context() as patch:
        place: Any = object_journal.ObjectJournal if step == "append_commit" else S3Objects
        function, done = getattr(place, step), [0]

        def end(*args: Any, **options: Any) -> Any:
            if step == "put" and ".mergemill" in args[1]:
                return function(*args, **options)
            done[0] += 1
            if done[0] == 3 or step == "append_commit":
                raise Killed
            return function(*args, **options)

        patch.setattr(place, step, end)
        with pytest.raises(Killed):
            run_here(plan, out.url)
    assert out.is_loadable() == (step == "append_commit"), "the index is written last"
    assert run_here(plan, out.url).redone_parts == 0
    assert out.hash() == expected_of(family)
    assert out.uploads() == {}


def test_receipts_are_in_the_storage_a_second_after_their_part(
    seaweed: S3, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no other part follows: a driver that is killed during a long one loses none before it."""
    monkeypatch.setattr(object_journal, "FLUSH_S", 0.1)
    out = new_place(seaweed)
    seen: list[int] = []

    def wait(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 2:
            for _ in range(100):
                names = [name for name in out.sizes() if name.startswith(f"{STATE}journal/")]
                seen[:] = [len(json.loads(out.read()[name])) for name in names]
                if sum(seen) == 2:
                    break

    run(plan, out.url, workers=0, threads=1, on_event=wait)
    assert sum(seen) == 2


# --- giving up ---


def test_abort_leaves_nothing_of_the_merge_and_everything_else(s3: S3, plan: Plan) -> None:
    out = new_place(s3)
    run_until(plan, out, 4)
    out.put("notes.txt", b"mine")
    size_bytes = sum(size for upload in out.uploads() for size in out.parts(upload))
    upload = out.start_upload("large.bin")
    assert abort(out.url) == size_bytes > 1 << 20
    assert out.read() == {"notes.txt": b"mine"}
    assert list(out.uploads()) == [upload]


def test_a_resume_leaves_uploads_of_others_alone(seaweed: S3, plan: Plan) -> None:
    out = new_place(seaweed)
    run_until(plan, out, 2)
    upload = out.start_upload("large.bin")
    orphan = out.start_upload(plan.shards[3].name)  # of a driver that died before it could note it
    run_here(plan, out.url)
    assert orphan not in out.uploads()
    assert list(out.uploads()) == [upload]


def test_abort_takes_back_what_an_interrupted_commit_has_written(
    seaweed: S3, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_place(seaweed)
    with monkeypatch.context() as patch:
        patch.setattr(object_journal.ObjectJournal, "append_commit", raise_killed)
        with pytest.raises(Killed):
            run_here(plan, out.url)
    assert out.is_loadable()
    abort(out.url)
    assert out.read() == {}
    with refused(OutputError, "holds no unfinished merge; there is nothing to abort"):
        abort(out.url)


def raise_killed(*args: Any) -> None:
    raise Killed


def test_abort_refuses_a_finished_merge(seaweed: S3, plan: Plan) -> None:
    out = new_place(seaweed)
    run_here(plan, out.url)
    before = out.read()
    with refused(OutputError, "is a finished merge; remove the objects yourself if you do not want them"):
        abort(out.url)
    assert out.read() == before


# --- two drivers ---


def test_a_second_driver_is_refused_while_one_writes(seaweed: S3, plan: Plan, family: Path) -> None:
    out = new_place(seaweed)
    errors: list[OutputError] = []

    def intrude(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 2:
            for attempt in (lambda: run_here(plan, out.url), lambda: abort(out.url)):
                with pytest.raises(OutputError) as found:
                    attempt()
                errors.append(found.value)

    run_here(plan, out.url, on_event=intrude)
    assert [f"another mergemill is writing here (process {os.getpid()} of " in str(error) for error in errors] == [
        True
    ] * 2
    assert out.hash() == expected_of(family)
    assert f"{STATE}lock" not in out.sizes()


def write_lock(out: Place, **changes: Any) -> None:
    """Leave the lock of another driver."""
    with hold_lease(S3Objects(), f"{out.url}/{STATE}lock", out.url):
        own = json.loads(out.read()[f"{STATE}lock"])
    out.put(f"{STATE}lock", json.dumps(own | changes).encode())


def test_a_driver_of_this_host_that_was_killed_does_not_block(seaweed: S3, plan: Plan, family: Path) -> None:
    out = new_place(seaweed)
    with subprocess.Popen(["sleep", "60"]) as other:
        write_lock(out, pid=other.pid, started=lease.find_start(other.pid))
        with refused(OutputError, rf"another mergemill is writing here \(process {other.pid} of .*, seen \d+ s ago\)"):
            run_here(plan, out.url)
        other.kill()
    run_here(plan, out.url)
    assert out.hash() == expected_of(family)


def test_a_process_that_has_got_the_number_of_a_killed_driver_does_not_block(seaweed: S3, plan: Plan) -> None:
    out = new_place(seaweed)
    write_lock(out, pid=os.getppid(), started="1")
    run_here(plan, out.url)


def test_a_driver_of_another_host_blocks_until_its_lease_is_old(
    seaweed: S3, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = new_place(seaweed)
    write_lock(out, host="elsewhere", pid=7, processes="others")
    message = (
        r"\(process 7 of elsewhere, seen \d+ s ago\); wait for it or stop it; one that was killed is forgotten after"
    )
    for attempt in (lambda: run_here(plan, out.url), lambda: abort(out.url)):
        with refused(OutputError, message):
            attempt()
    assert list(out.sizes()) == [f"{STATE}lock"]
    monkeypatch.setattr(lease, "OLD_S", -1)
    run_here(plan, out.url)
    assert f"{STATE}lock" not in out.sizes()


def test_a_lease_is_renewed_while_it_is_held(seaweed: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    out, written = new_place(seaweed), []
    put = S3Objects.put

    def note(self: S3Objects, url: str, *args: Any, **options: Any) -> bool:
        written.append(url)
        return put(self, url, *args, **options)

    monkeypatch.setattr(S3Objects, "put", note)
    with hold_lease(S3Objects(), f"{out.url}/{STATE}lock", out.url):
        while len(written) < 4:
            pass
    assert out.sizes() == {}


def test_a_lease_that_another_one_has_taken_is_neither_renewed_nor_removed(
    seaweed: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    out = new_place(seaweed)
    mine = Lease(S3Objects(), f"{out.url}/{STATE}lock", out.url)
    mine.take()
    out.put(f"{STATE}lock", b"{}")
    mine.renew(threading.Event())
    mine.release()
    assert out.read() == {f"{STATE}lock": b"{}"}


def test_a_driver_whose_lease_was_taken_does_not_commit(seaweed: S3, plan: Plan) -> None:
    """As one that slept for so long that another has begun."""
    out = new_place(seaweed)

    def take(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            out.put(f"{STATE}lock", b"{}")

    with refused(OutputError, "another mergemill has begun to write here; wait for it or stop it"):
        run_here(plan, out.url, on_event=take)
    assert without_state(out.read()) == {}
    assert out.read()[f"{STATE}lock"] == b"{}"


# --- what is wrong with the place or the credentials ---

NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
GONE, NO_URL = (
    "no such object, prefix or bucket",
    "a URL is s3://bucket/key; keys come from the environment or a profile",
)
WRONG: Mapping[str, tuple[str, str, Mapping[str, str | None], str]] = {
    "no bucket to write to": ("{family}", "s3://nobody/out", {}, f"s3://nobody/out: {GONE}"),
    "no bucket to read from": ("s3://nobody", "{new}", {}, f"s3://nobody/A: {GONE}"),
    "no such model": ("s3://models/no-such", "{new}", {}, f"s3://models/no-such/A: {GONE}"),
    "no such model to write to S3": ("s3://models/no-such", "{new}", {}, f"s3://models/no-such/A: {GONE}"),
    "no credentials to write": (
        "{family}",
        "{new}",
        NO_KEYS,
        "no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and",
    ),
    "no credentials to read": (
        "{models}",
        "{disk}",
        NO_KEYS,
        "A: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID",
    ),
    "half of the credentials": (
        "{family}",
        "{new}",
        {"AWS_SECRET_ACCESS_KEY": None},
        "Partial credentials found in env",
    ),
    "a wrong secret to write": (
        "{family}",
        "{new}",
        {"AWS_SECRET_ACCESS_KEY": "guessed"},
        "access denied (SignatureDoesNotMatch); check the credentials",
    ),
    "a wrong secret to read": (
        "{models}",
        "{disk}",
        {"AWS_SECRET_ACCESS_KEY": "guessed"},
        "access denied (SignatureDoesNotMatch); check the credentials",
    ),
    "a wrong key to write": (
        "{family}",
        "{new}",
        {"AWS_ACCESS_KEY_ID": "GUESSEDKEY"},
        "access denied (InvalidAccessKeyId); check the credentials",
    ),
    "a wrong key to read": (
        "{models}",
        "{disk}",
        {"AWS_ACCESS_KEY_ID": "GUESSEDKEY"},
        "access denied (InvalidAccessKeyId); check the credentials",
    ),
    "no server to write to": (
        "{family}",
        "{new}",
        {"AWS_ENDPOINT_URL": "{nobody}"},
        "cannot be reached: Could not connect to",
    ),
    "no server to read from": (
        "{models}",
        "{disk}",
        {"AWS_ENDPOINT_URL": "{nobody}"},
        "cannot be reached: Could not connect to",
    ),
    "no bucket named": ("{family}", "s3://", {}, NO_URL),
    "only a key named": ("{family}", "s3:///out", {}, NO_URL),
    "keys in the output's URL": ("{family}", "s3://MYKEY:GUESSED/guessed@models/out", {}, NO_URL),
    "keys in a model's URL": ("s3://MYKEY:GUESSED@models/family", "{disk}", {}, "its URL holds a user or a password"),
    "keys with a slash in a model's URL": ("s3://MYKEY:GUE/SSED@models/family", "{disk}", {}, NO_URL),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_place_or_credentials_is_one_line_before_anything_is_written(
    case: str,
    seaweed: S3,
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    models, out, changes, message = WRONG[case]
    new = new_place(seaweed)
    places = {
        "family": str(family),
        "models": put_family(seaweed, family).url,
        "new": new.url,
        "disk": str(tmp_path / "out"),
        "nobody": f"http://127.0.0.1:{find_free_ports(1)[0]}",
    }
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value.format(**places))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(write_recipe("linear", models.format(**places)))
    for options in ([], ["--json"]):
        assert execute(["merge", str(recipe), out.format(**places), *options]) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert message in lines[-1]
        assert [line.startswith("mergemill: error: ") for line in lines][-2:].count(True) == 1
        for secret in ("GUESSED", "guessed", "SSED", seaweed.secret_key, seaweed.access_key):
            assert secret not in printed.out + printed.err
    assert list(tmp_path.iterdir()) == [recipe]
    assert new.sizes() == new.uploads() == {}


@pytest.mark.parametrize("command", ["verify", "inspect", "abort"])
@pytest.mark.parametrize("place", ["s3://nobody/out", "s3://models/nothing", "s3://"])
def test_commands_on_a_merge_that_is_not_there_say_so(
    command: str, place: str, seaweed: S3, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute([command, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mergemill: error: s3://")


def test_a_finished_merge_gives_way_where_that_is_asked(s3: S3, family: Path) -> None:
    place = new_place(s3)
    run(plan_case("streamed", family), place.url, workers=0)
    with pytest.raises(OutputError, match="replace it with --overwrite"):
        run(plan_case("several shards", family), place.url, workers=0)
    run(plan_case("several shards", family), place.url, workers=0, overwrite=True)
    assert without_state(place.hash()) == hash_all(merge_locally("several shards", family))
    assert place.uploads() == {}


def test_models_and_adapters_in_s3_are_merged_as_those_on_this_disk(seaweed_server: S3, tmp_path: Path) -> None:
    from adapters import make_llama, write_adapter, write_model

    module = make_llama()
    write_model(module, tmp_path / "models" / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        write_adapter(module, tmp_path / "models" / name, seed=seed)
    stored = put_family(seaweed_server, tmp_path / "models")

    def plan(place: Path | str) -> Plan:
        models = [
            {"model": f"{place}/base+{place}/{name}", "parameters": {"weight": weight}}
            for name, weight in (("one", 0.25), ("two", 0.75))
        ]
        return make_plan({"merge_method": "linear", "models": models})

    run(plan(tmp_path / "models"), tmp_path / "here", workers=0)
    out = new_place(seaweed_server)
    with found_by_environment(seaweed_server):
        run(plan(stored.url), out.url, workers=0)
        verify(out.url)
    weights = [
        {name: made for name, made in hashes.items() if name.endswith(".safetensors")}
        for hashes in (out.hash(), hash_output(tmp_path / "here"))
    ]
    assert weights[0] == weights[1]
    assert weights[0]

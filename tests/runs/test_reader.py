"""`reader: fsspec`: slices read through fsspec, on every kind of storage, are the bytes of the usual way."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from hubs import use_hub
from models import write_llama
from runs.buckets import found_by_environment, new_place, put_family
from runs.merging import hash_output, make_recipe_of, plan_merge
from servers.hub import Hub
from servers.origin import start_origin
from servers.s3 import S3

from mergemill.cli.main import execute
from mergemill.engine import make_plan, merge, run, verify
from mergemill.engine.errors import CheckpointError, InputError, SourceChanged
from mergemill.engine.storage import anything, plain
from mergemill.engine.storage.ranges import close_all, list_files, pin_file, read_into
from mergemill.engine.storage.store import make_storage

KINDS = ["a disk", "SeaweedFS", "moto", "the Hub", "the web", "memory"]


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest, family: Path, tmp_path: Path) -> Iterator[str]:
    """Where the family lies, in each kind of storage."""
    with ExitStack() as stack:
        yield _place(request.param, request, family, tmp_path, stack)
    close_all()


def _place(kind: str, request: pytest.FixtureRequest, family: Path, tmp_path: Path, stack: ExitStack) -> str:
    files = {f"{path.parent.name}/{path.name}": path for path in sorted(family.glob("*/*")) if path.is_file()}
    if kind in ("SeaweedFS", "moto"):
        server: S3 = request.getfixturevalue("seaweed_server" if kind == "SeaweedFS" else "moto_server")
        stack.enter_context(found_by_environment(server))
        return put_family(server, family).url
    if kind == "the Hub":
        hub: Hub = request.getfixturevalue("hub")
        for name in ("base", "A", "B"):
            hub.add_repo(f"org/{name}", {path.name: path for path in (family / name).iterdir()})
        stack.enter_context(use_hub(hub, tmp_path / "home"))
        return "hf://org"
    if kind == "the web":
        request.getfixturevalue("monkeypatch").setenv("no_proxy", "127.0.0.1")
        origin = stack.enter_context(start_origin(**{name: path.read_bytes() for name, path in files.items()}))
        return origin.url
    if kind == "memory":
        system = fsspec.filesystem("memory")
        for name, path in files.items():
            system.pipe(f"/reader/{name}", path.read_bytes())
        stack.callback(system.rm, "/reader", recursive=True)
        return "memory://reader"
    return str(family)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what fsspec was asked for, by the two functions that ask."""
    found: list[int] = []
    ask, ask_local = anything.read_plainly, LocalFileSystem.cat_file

    def read_plainly(*given: Any) -> int:
        found.append(ask(*given))
        return found[-1]

    def cat_file(self: Any, path: str, start: int, end: int) -> Any:
        found.append(end - start)
        return ask_local(self, path, start, end)

    monkeypatch.setattr(plain, "read_plainly", read_plainly)
    monkeypatch.setattr(anything, "read_plainly", read_plainly)
    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    return found


def hash_weights(out: Path) -> dict[str, str]:
    return {name: found for name, found in hash_output(out).items() if name not in ("README.md", "recipe.yml")}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_has_the_same_bytes_read_through_fsspec(
    method: str, models: str, family: Path, tmp_path: Path, read: list[int]
) -> None:
    run(plan_merge(method, family, shard_size="700KB"), tmp_path / "usual", workers=0, threads=2)
    plan = plan_merge(method, models, shard_size="700KB")
    read.clear()
    run(plan, tmp_path / "plain", workers=0, threads=4, reader="fsspec")
    assert hash_weights(tmp_path / "plain") == hash_weights(tmp_path / "usual")
    assert sum(read) >= plan.read_bytes


def test_plans_do_not_differ_by_it(models: str) -> None:
    every = {"*": {"reader": "fsspec"}}
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": f"{models}/A"}]}
    plan, other = make_plan(make_recipe_of(recipe)), make_plan(make_recipe_of(recipe), storage=every)
    assert plan.digest == other.digest


def test_the_usual_reader_asks_fsspec_for_no_slice(family: Path, s3: S3, tmp_path: Path, read: list[int]) -> None:
    for place in (str(family), put_family(s3, family).url):
        run(plan_merge("linear", place), tmp_path / place.replace("/", ""), workers=0, threads=2)
    assert read == []


def test_the_variable_asks_for_it_and_an_option_is_stronger(
    family: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEMILL_READER", "fsspec")
    plan = plan_merge("linear", family)
    run(plan, tmp_path / "out", workers=0, threads=2)
    assert sum(read) >= plan.read_bytes
    read.clear()
    verify(tmp_path / "out")
    assert sum(read) >= plan.shards[0].size_bytes
    read.clear()
    run(plan, tmp_path / "again", workers=0, threads=2, reader="direct")
    assert read == []


def test_it_goes_to_worker_processes(s3: S3, family: Path, tmp_path: Path) -> None:
    plan = plan_merge("linear", put_family(s3, family).url, shard_size="700KB")
    run(plan_merge("linear", family, shard_size="700KB"), tmp_path / "usual", workers=0, threads=2)
    run(plan, tmp_path / "out", workers=1, reader="fsspec")
    assert hash_weights(tmp_path / "out") == hash_weights(tmp_path / "usual")


def test_a_recipe_may_say_it_for_one_kind_of_storage(family: Path, tmp_path: Path, read: list[int]) -> None:
    body = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(family / "A")}]}
    merge(body | {"storage_options": {"file": {"reader": "fsspec"}}}, tmp_path / "out", workers=0, threads=2)
    assert read
    read.clear()
    merge(body | {"storage_options": {"s3": {"reader": "fsspec"}}}, tmp_path / "other", workers=0, threads=2)
    assert read == []


def test_the_command_line_has_it(
    family: Path, tmp_path: Path, read: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [model: {family}/A]\n")
    assert execute(["merge", str(recipe), str(tmp_path / "out"), "--workers", "0", "--reader", "fsspec"]) == 0
    assert read
    assert execute(["merge", str(recipe), str(tmp_path / "other"), "--workers", "0", "--reader", "fspec"]) == 2
    assert "reader: must be direct or fsspec, not 'fspec'" in capsys.readouterr().err


def test_what_it_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="storage_options: s3: reader: must be direct or fsspec, not 'fast'"):
        make_storage({"s3": {"reader": "fast"}})
    with pytest.raises(CheckpointError, match=r"storage_options: \*: unknown option 'profile'; known are reader"):
        make_storage({"*": {"profile": "team"}})
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "storage_options": {"s3": {"reader": "fast"}}}
    with pytest.raises(InputError, match="must be direct or fsspec"):
        make_recipe_of(recipe)
    monkeypatch.setenv("MERGEMILL_READER", "fast")
    with pytest.raises(CheckpointError, match="MERGEMILL_READER: must be direct or fsspec, not 'fast'"):
        make_storage(None)


def test_one_kind_may_be_read_otherwise_than_all() -> None:
    storage = make_storage({"*": {"reader": "fsspec"}, "s3": {"reader": "direct", "profile": "team"}})
    assert [storage.reads_plainly(scheme) for scheme in ("file", "hf", "s3")] == [True, True, False]
    assert storage.find("s3") == (("profile", "team"),)


@pytest.mark.parametrize("kind", ["a disk", "S3"])
def test_a_source_that_changed_is_not_read(kind: str, s3: S3, tmp_path: Path) -> None:
    """Neither the file nor the server compares what it gives with what was planned."""
    write_llama(tmp_path / "m", seed=1, layers=1)
    place = new_place(s3, name="changing").fill(tmp_path / "m")
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(tmp_path / "m") if kind == "a disk" else place.url}],
    }
    plan = make_plan(make_recipe_of(recipe))
    write_llama(tmp_path / "m", seed=2, layers=1)
    place.fill(tmp_path / "m")
    with pytest.raises(SourceChanged, match="changed since the plan was made"):
        run(plan, tmp_path / "out", workers=0, threads=1, reader="fsspec")


def test_a_file_of_this_machine_that_is_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    pin = pin_file(path)
    path.write_bytes(bytes(50))
    with pytest.raises(SourceChanged, match="changed since the plan was made"):
        read_into(pin, 0, memoryview(bytearray(100)), make_storage({"*": {"reader": "fsspec"}}))


def test_no_file_system_is_shared_with_the_program_around_it(s3: S3) -> None:
    """fsspec gives all of a process the same one, with its listings; a merge's own keeps none, and is set otherwise."""
    place = new_place(s3, name="listed")
    place.put("a/config.json", b"{}")
    with found_by_environment(s3):
        theirs = fsspec.filesystem("s3", endpoint_url=s3.url)
        assert isinstance(theirs, AbstractFileSystem)
        before = theirs.ls(f"{place.url}/a", detail=False)
        assert list(list_files(f"{place.url}/a", "") or ()) == ["config.json"]
        place.put("a/model.safetensors", b"12345678")
        assert list(list_files(f"{place.url}/a", "") or ()) == ["config.json", "model.safetensors"]
        assert theirs.ls(f"{place.url}/a", detail=False) == before

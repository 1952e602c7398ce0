"""Merges to the Hub, on the stand-in: the bytes of a folder's, in one commit, with nothing half-made ever seen."""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from runs import merging
from runs.merging import Killed, make_recipe_of, parts_of, plan_merge, write_family
from servers import faults
from servers.hub import Hub
from servers.hub_store import Repo
from servers.proxy import start_proxy

pytest.importorskip("huggingface_hub")

from hubs import Use, use_hub

from mergemill.cli.main import execute
from mergemill.engine import abort, inspect, make_plan, run, verify
from mergemill.engine.errors import MergemillError, OutputError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed, Event, PartFinished, Started
from mergemill.engine.runs.outputs import hub as hub_module
from mergemill.engine.runs.outputs import record
from mergemill.engine.storage.hub_upload import Content, HubRepo
from mergemill.engine.storage.store import Unavailable

# Of httpx2, to huggingface_hub 2.4.0.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

NAME = "org/merged"
URL = f"hf://{NAME}"
PART = 1 << 20
INDEX = "model.safetensors.index.json"
STATE = ".mergemill/"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Have this process be another machine: return where that keeps what it knows of its merges."""

    def become(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name / "mergemill" / "uploads"

    return become


@pytest.fixture
def state(machine: Callable[[str], Path]) -> Path:
    """Where this machine keeps what it knows of its merges."""
    return machine("first machine")


@pytest.fixture(autouse=True)
def use(hub: Hub, tmp_path: Path, state: Path) -> Iterator[Use]:
    """Have this process use the Hub of the test, as its owner."""
    with use_hub(hub, tmp_path / "home") as start:
        start(token=hub.token)
        yield start


@pytest.fixture
def plan(family: Path) -> Plan:
    """A merge of five shards."""
    return plan_shards(family)


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, str]:
    """The hashes of the same merge in a folder."""
    run_here(plan, tmp_path / "expected")
    return hash_output(tmp_path / "expected")


def plan_shards(family: Path, method: str = "ties", *, shard_size: str = "1MB") -> Plan:
    return plan_merge(method, family, part_bytes=PART, shard_size=shard_size)


def run_here(plan: Plan, out: str | Path = URL, **options: Any) -> Committed:
    return run(plan, out, **{"workers": 0, "threads": 2} | options)


def run_until(plan: Plan, shards: int) -> None:
    """Run `plan` on one thread and end as if killed once so many parts, each a shard, have receipts."""
    assert len(plan.parts) == len(plan.shards)

    def stop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == shards:
            raise Killed

    with pytest.raises(Killed):
        run_here(plan, threads=1, on_event=stop)


def hash_output(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder but the card, which goes by the repository's name on the Hub."""
    return {name: sha256 for name, sha256 in merging.hash_output(folder).items() if name != "README.md"}


def hash_repo(hub: Hub, name: str = NAME) -> dict[str, str]:
    """Return the sha256 of every file of the main branch but the card, mergemill's own and the Hub's, by name."""
    commit = hub.repos[name].find_commit("main")
    assert commit
    files = commit.files.items()
    return {path: file.sha256 for path, file in files if not path.startswith((STATE, ".gitattributes", "README.md"))}


def titles(repo: Repo) -> list[str]:
    return [commit.title for commit in repo.commits.values()]


def uploads(hub: Hub) -> int:
    """Return how many files were sent to the storage of the Hub."""
    return hub.journal.count()["cdn_put"]


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- what comes out ---


@pytest.mark.parametrize(("method", "shard_size"), [("linear", "5GB"), ("ties", "1MB"), ("ties", "tensor")])
def test_one_commit_holds_the_bytes_of_a_folder(
    hub: Hub, family: Path, tmp_path: Path, state: Path, method: str, shard_size: str
) -> None:
    plan = plan_shards(family, method, shard_size=shard_size)
    run_here(plan, tmp_path / "expected")
    committed = run_here(plan)
    assert committed.redone_parts == len(plan.parts)
    assert hash_repo(hub) == hash_output(tmp_path / "expected")
    assert titles(hub.repos[NAME]) == ["initial commit", hub_module.TITLE]
    assert uploads(hub) == len(plan.shards)
    assert list_files(state) == []


def test_a_repository_is_private_unless_asked_otherwise(hub: Hub, plan: Plan) -> None:
    run_here(plan)
    run_here(plan, "hf://org/shown", public=True)
    assert (hub.repos[NAME].private, hub.repos["org/shown"].private) == (True, False)


def test_a_merge_on_the_hub_is_verified_inspected_and_not_done_again(
    hub: Hub, plan: Plan, state: Path, use: Use
) -> None:
    run_here(plan)
    with parts_of(PART):
        assert verify(URL, replay=2).replayed == 2
    found = inspect(URL)
    assert (found.kind, found.state, found.shards) == ("merge", "finished", len(plan.shards))
    assert run_here(plan).redone_parts == 0
    assert len(hub.repos[NAME].commits) == 2
    with pytest.raises(OutputError, match="no merge that goes there is unfinished on this machine"):
        abort(URL)
    hub.repos[NAME].private = False
    use()
    assert verify(URL).shards == len(plan.shards), "without a token"
    assert inspect(f"{URL}@main").kind == "checkpoint"


def test_what_is_published_tells_nothing_of_folders_and_tokens(hub: Hub, plan: Plan, family: Path) -> None:
    run_here(plan)
    commit = hub.repos[NAME].find_commit("main")
    assert commit
    for name in (f"{STATE}plan.json", f"{STATE}journal.json"):
        path = hub.contents.find(commit.files[name].sha256)
        assert path
        text = path.read_text()
        assert hub.token not in text
        assert f"{family}/A/" not in text, "files of it; the recipe itself names the folder"
        assert json.loads(text)


def test_a_large_file_that_is_only_copied_goes_as_shards_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "JOINED_BYTES", 1 << 20)
    data = b"".join(number.to_bytes(8, "little") for number in range(600_000))
    models = write_family(tmp_path / "models", vocab=256, hidden=64, layers=1)
    (models / "base" / "spiece.model").write_bytes(data)
    plan = plan_shards(models)
    run_here(plan, tmp_path / "expected")
    sent: list[str] = []
    upload = HubRepo.upload

    def note(self: HubRepo, content: Content, *rest: Any) -> None:
        sent.append(content.name)
        upload(self, content, *rest)

    monkeypatch.setattr(HubRepo, "upload", note)
    run_here(plan)
    assert hash_repo(hub) == hash_output(tmp_path / "expected")
    assert sent[-1] == "spiece.model"
    assert verify(URL).parts == len(plan.parts)


def test_shards_of_no_elements_are_written_too(hub: Hub, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        write_llama(tmp_path / name, seed=seed, layers=1, extras=("empty",))
    models = [{"model": str(tmp_path / name)} for name in "AB"]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    plan = make_plan(make_recipe_of(recipe), shard_size="tensor")
    assert len({part.shard for part in plan.parts}) < len(plan.shards)
    run_here(plan, tmp_path / "expected")
    for out in (URL, f"local://{tmp_path}/whole", "memory://whole/of-none"):
        run_here(plan, out)
        assert verify(out).shards == len(plan.shards)
    assert hash_repo(hub) == hash_output(tmp_path / "expected") == hash_output(tmp_path / "whole")


def test_worker_processes_of_this_machine_upload(hub: Hub, plan: Plan, expected: dict[str, str]) -> None:
    run(plan, URL, workers=2)
    assert hash_repo(hub) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_the_disk_holds_no_more_shards_than_are_in_work(
    hub: Hub, family: Path, state: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    plan = plan_shards(family, shard_size="tensor")
    seen: list[int] = []
    upload = HubRepo.upload

    def look(repo: HubRepo, content: Content, path: Path, check_going: Callable[[], None]) -> None:
        seen.append(sum(".tmp-" in each.name for each in list_files(state)))
        upload(repo, content, path, check_going)

    monkeypatch.setattr(HubRepo, "upload", look)
    run_here(plan, threads=threads)
    assert len(seen) == len(plan.shards) > 10
    assert max(seen) <= threads


def test_what_a_killed_worker_left_makes_room_for_the_next_attempt(plan: Plan, state: Path) -> None:
    def leave(event: Event) -> None:
        if isinstance(event, Started):
            [folder] = {path.parent for path in list_files(state)}
            (folder / f"{plan.shards[-1].name}.tmp-0123").write_bytes(b"half")

    def look(event: Event) -> None:
        leave(event)
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            assert not [path for path in list_files(state) if ".tmp-" in path.name]

    run_here(plan, on_event=look)


# --- nothing half-made, resuming ---


def test_a_killed_merge_shows_nothing_and_goes_on(hub: Hub, plan: Plan, expected: dict[str, str], state: Path) -> None:
    run_until(plan, 2)
    assert hash_repo(hub) == {}
    assert titles(hub.repos[NAME]) == ["initial commit"]
    assert not [path for path in list_files(state) if "safetensors" in path.name]
    assert inspect(URL).state == f"unfinished: 2 of {len(plan.parts)} parts"
    before = uploads(hub)
    begun: list[Event] = []
    assert run_here(plan, on_event=begun.append).redone_parts == len(plan.parts) - 2
    assert [event.resumed_parts for event in begun if isinstance(event, Started)] == [2]
    assert uploads(hub) - before == len(plan.shards) - 2
    assert hash_repo(hub) == expected
    assert titles(hub.repos[NAME]) == ["initial commit", hub_module.TITLE]


def test_a_merge_that_is_killed_before_its_commit_only_commits(
    hub: Hub, plan: Plan, expected: dict[str, str], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HubRepo, "commit", _die)
        with pytest.raises(Killed):
            run_here(plan)
    assert hash_repo(hub) == {}
    assert run_here(plan).redone_parts == 0
    assert uploads(hub) == len(plan.shards)
    assert hash_repo(hub) == expected
    assert list_files(state) == []


def _die(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_commit_whose_answer_is_lost_is_not_done_twice(
    hub: Hub, plan: Plan, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HubRepo.commit

    def lose(*args: Any) -> None:
        commit(*args)
        raise Unavailable("the connection was lost")

    monkeypatch.setattr(HubRepo, "commit", lose)
    run_here(plan)
    assert titles(hub.repos[NAME]) == ["initial commit", hub_module.TITLE]
    assert hash_repo(hub) == expected


def test_a_merge_that_is_killed_after_its_commit_is_finished(
    hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hub_module.FolderOutput, "discard", _die)
        with pytest.raises(Killed):
            run_here(plan)
    assert inspect(URL).state == "finished"
    assert run_here(plan).redone_parts == 0
    assert len(hub.repos[NAME].commits) == 2


def test_another_machine_merges_again_and_uploads_what_the_hub_has_not(
    hub: Hub, plan: Plan, expected: dict[str, str], machine: Callable[[str], Path]
) -> None:
    run_until(plan, 2)
    before = uploads(hub)
    machine("second machine")
    assert run_here(plan).redone_parts == len(plan.parts)
    assert before <= uploads(hub) == len(plan.shards)
    assert hash_repo(hub) == expected
    machine("first machine")
    assert run_here(plan).redone_parts == 0


def test_a_shard_that_the_hub_has_dropped_is_merged_again(hub: Hub, plan: Plan, expected: dict[str, str]) -> None:
    run_until(plan, 2)
    first = next(path for path in hub.contents.folder.iterdir() if path.stat().st_size > PART // 2)
    first.unlink()
    assert run_here(plan).redone_parts == len(plan.parts) - 1
    assert hash_repo(hub) == expected


def test_a_shard_that_is_dropped_before_the_commit_is_told_of(hub: Hub, plan: Plan) -> None:
    def drop(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == len(plan.parts):
            next(path for path in hub.contents.folder.iterdir() if path.stat().st_size > PART // 2).unlink()

    with pytest.raises(RunError, match=r"the Hub has lost model-.*; run the same merge again to resume"):
        run_here(plan, on_event=drop)
    assert hash_repo(hub) == {}
    assert run_here(plan).redone_parts == 1


def test_addresses_that_run_out_are_asked_for_again(
    hub: Hub, plan: Plan, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = hub.sign
    failed: list[str] = []

    def sign_badly(path: str, url: str) -> str:
        if "/upload/" in path and len(failed) < 2:
            failed.append(path)
            return f"{url}{path}?Expires=0&Signature=old"
        return sign(path, url)

    monkeypatch.setattr(hub, "sign", sign_badly)
    run_here(plan)
    assert len(failed) == 2
    assert hash_repo(hub) == expected


def test_a_storage_that_fails_is_asked_again(hub: Hub, family: Path, tmp_path: Path) -> None:
    plan = plan_shards(family, "linear", shard_size="5GB")
    run_here(plan, tmp_path / "expected")
    with start_proxy(hub.cdn_url, faults.at_first(1, faults.refuse(503), "cdn_put")) as storage:
        hub.cdn_url = storage.url
        run_here(plan)
        assert storage.journal.count_faults() == {"refuse 503": 1}
    assert hash_repo(hub) == hash_output(tmp_path / "expected")


def test_large_uploads_go_in_parts(hub: Hub, plan: Plan, expected: dict[str, str]) -> None:
    hub.part_bytes = 300_000
    run_here(plan)
    assert hub.journal.count()["complete_parts"] == sum(shard.size_bytes > 300_000 for shard in plan.shards)
    assert hash_repo(hub) == expected


def test_an_upload_ends_when_the_worker_does(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(NAME)
    data = bytes(range(256)) * 40_000
    path = tmp_path / "shard"
    path.write_bytes(data)
    asked: list[int] = []

    def check_going() -> None:
        asked.append(1)
        if len(asked) == 5:
            raise RunError("the worker is being stopped")

    content = Content("model.safetensors", len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(RunError, match="being stopped"):
        HubRepo(NAME, hub.url).upload(content, lambda: path.open("rb", buffering=0), check_going)
    assert len(asked) == 5


# --- what is not ours ---


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", ".gitignore"])
def test_a_repository_that_holds_anything_else_is_refused(hub: Hub, plan: Plan, name: str) -> None:
    head = hub.add_repo(NAME, {name: b"{}", "README.md": b"mine"}, private=True)
    with pytest.raises(OutputError, match=rf"{URL}: holds '{name}'; the output must be a repository without a model"):
        run_here(plan)
    assert hub.repos[NAME].branches["main"] == head


def test_a_repository_without_a_model_is_used(hub: Hub, plan: Plan, expected: dict[str, str]) -> None:
    hub.add_repo(NAME, {"README.md": b"mine", "LICENSE": b"terms"}, private=True)
    run_here(plan)
    found = hash_repo(hub)
    assert found.pop("LICENSE") == hashlib.sha256(b"terms").hexdigest()
    assert found == expected


def test_who_may_see_a_repository_that_is_there_is_not_changed(hub: Hub, plan: Plan) -> None:
    hub.add_repo("org/shown")
    hub.add_repo("org/hidden", private=True)
    with pytest.raises(OutputError, match="is there already and public; if it is to be, say so with --public"):
        run_here(plan, "hf://org/shown")
    with pytest.raises(OutputError, match="is there already and private; if it is to be, leave out --public"):
        run_here(plan, "hf://org/hidden", public=True)
    run_here(plan, "hf://org/shown", public=True)
    assert not hub.repos["org/shown"].private


def test_another_merge_is_refused(hub: Hub, plan: Plan, family: Path) -> None:
    other = plan_shards(family, "linear")
    run_until(plan, 1)
    with pytest.raises(OutputError, match="holds another merge, which differs in the recipe"):
        run_here(other)
    run_here(plan)
    with pytest.raises(OutputError, match="holds another merge, which differs in the recipe"):
        run_here(other)
    assert len(hub.repos[NAME].commits) == 2


def test_what_appears_while_the_merge_runs_is_left_alone(hub: Hub, plan: Plan) -> None:
    def appear(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 1:
            hub.add_commit(NAME, {"model.safetensors": b"somebody's"})

    with pytest.raises(OutputError, match=r"holds 'model.safetensors'; the output must be"):
        run_here(plan, on_event=appear)
    assert set(hash_repo(hub)) == {"model.safetensors"}
    hub.add_commit(NAME, {"model.safetensors": None})
    assert run_here(plan).redone_parts == 0


def test_a_commit_between_the_last_look_and_ours_is_told_of(
    hub: Hub, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = HubRepo.commit

    def come_first(*args: Any) -> None:
        hub.add_commit(NAME, {"notes.txt": b"mine"})
        commit(*args)

    monkeypatch.setattr(HubRepo, "commit", come_first)
    with pytest.raises(RunError, match="somebody else has written to it meanwhile: run the same merge again"):
        run_here(plan)
    assert set(hash_repo(hub)) == {"notes.txt"}


def test_a_second_driver_of_this_machine_is_refused(plan: Plan) -> None:
    errors: list[str] = []

    def try_too(event: Event) -> None:
        if isinstance(event, Started):
            with pytest.raises(OutputError) as caught:
                run_here(plan)
            errors.append(str(caught.value))

    run_here(plan, on_event=try_too)
    assert errors == [f"{URL}: another mergemill is writing here; wait for it or stop it"]


def test_abort_removes_what_this_machine_keeps(hub: Hub, plan: Plan, state: Path) -> None:
    run_until(plan, 1)
    assert list_files(state)
    assert abort(URL) > 0
    assert list_files(state) == []
    assert hash_repo(hub) == {}
    run_here(plan)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("package", "url", "extra"), [("huggingface_hub", URL, "hub"), ("boto3", "s3://bucket/out", "s3")]
)
def test_a_client_that_is_missing_names_its_extra(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, package: str, url: str, extra: str
) -> None:
    ours = ("mergemill.engine.storage.", "mergemill.engine.runs.")
    names = ("hub", "staged", "published", "bucket", "upload", "s3", "multipart")
    for name in list(sys.modules):
        if name.startswith(ours) and name.rpartition(".")[2].startswith(names):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert message_of(plan, url) == f"{url}: {package} is not installed; install mergemill[{extra}]"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"{URL}@v1", f"{URL}@v1: a merge is written to the main branch of a repository: {URL}"),
        (f"{URL}/folder", f"{URL}/folder: a merge is written to the main branch of a repository: {URL}"),
        ("hf://name", "hf://name: a model on the Hub is written hf://org/name"),
        ("hf://datasets/org/name", "hf://datasets/org/name: datasets of the Hub cannot be merged"),
    ],
)
def test_what_is_no_repository_is_refused(plan: Plan, url: str, message: str) -> None:
    assert message_of(plan, url).startswith(message)


def test_without_the_token_it_needs_nothing_begins(hub: Hub, plan: Plan, state: Path, use: Use) -> None:
    use()
    told = "log in with a token that may write: hf auth login, or set HF_TOKEN"
    assert message_of(plan) == f"{URL}: writing to the Hub needs a token; {told}"
    use(token="hf_wrong")
    assert message_of(plan).endswith(f"answers 401, 'Invalid credentials in Authorization header'; {told}")
    use(token=hub.stranger)
    assert "answers 403" in message_of(plan)
    assert "the token used here may not do that: make one that may at http" in message_of(plan)
    assert hub.repos == {}
    hub.add_repo(NAME, private=True)
    assert "cannot be seen with the token used here" in message_of(plan) or "403" in message_of(plan)


def test_offline_nothing_begins(hub: Hub, plan: Plan, use: Use) -> None:
    use(token=hub.token, offline=True)
    assert message_of(plan) == f"{URL}: the Hub may not be asked (HF_HUB_OFFLINE); merge into a folder"


def test_workers_of_a_cluster_are_refused(plan: Plan) -> None:
    assert "which the workers of a cluster do not share; leave out --scheduler" in message_of(
        plan, workers=None, threads=None, scheduler="tcp://127.0.0.1:1"
    )


def test_a_disk_without_room_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs("/")
    usage = type("Usage", (), {"free": 1_000_000, "total": found.f_blocks, "used": 0})
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage)
    said = message_of(plan)
    assert "disk too full: 2 shards of " in said
    assert "use fewer --workers and --threads, a smaller --shard-size, or another disk: XDG_CACHE_HOME" in said


def test_public_is_for_the_hub(plan: Plan, tmp_path: Path) -> None:
    assert message_of(plan, str(tmp_path / "out"), public=True).endswith(
        "--public is for repositories of the Hub: hf://org/name"
    )


def message_of(plan: Plan, out: str = URL, **options: Any) -> str:
    """Return the error of a merge that must not begin: one line without a token."""
    with pytest.raises(MergemillError) as caught:
        run_here(plan, out, **options)
    assert isinstance(caught.value, OutputError)
    said = str(caught.value)
    assert "\n" not in said
    assert "hf_" not in said
    return said


def test_the_command_line_merges_to_the_hub(
    hub: Hub, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"{{merge_method: linear, models: [{{model: {family}/A, parameters: {{weight: 1}}}}]}}")
    before = threading.active_count()
    assert execute(["merge", str(recipe), URL, "--public", "--quiet"]) == 0
    assert not hub.repos[NAME].private
    assert execute(["verify", URL]) == 0
    said = capsys.readouterr()
    assert f"{URL}: as it was written" in said.out
    assert "%|" not in said.err, "no bar of huggingface_hub"
    assert threading.active_count() <= before + 4


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("command", ["status", "attach", "cancel"])
def test_where_this_machine_drives_no_merge_to_the_hub_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute([command, URL]) == 2
    known = "one that goes to the Hub is known to the machine that drives it, until it is finished"
    assert capsys.readouterr() == ("", f"mergemill: error: {URL}: holds no merge ({known})\n")

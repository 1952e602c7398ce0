"""What lies beside a finished output may be uploaded: nothing in it tells of the machine, its folders or its secrets.

Each kind of output is merged as a user does it, by the command, from models beside the recipe.
"""

import getpass
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hubs import use_hub
from runs.buckets import found_by_environment, new_place
from runs.merging import Killed, hash_output, list_files, make_recipe, write_family
from runs.test_whole_shards import elsewhere, make_place
from servers.hub import Hub

from mergemill.cli.main import execute
from mergemill.engine import attach, inspect, make_plan, run, status, verify
from mergemill.engine.errors import OutputError, VerifyError
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import Recipe
from mergemill.engine.runs.events import Committed, Event, PartFinished, Started
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.output import find_output
from mergemill.engine.runs.outputs.record import make_record, parse_record
from mergemill.engine.storage.beneath import Beneath
from mergemill.engine.storage.store import ENVIRONMENT

# Of httpx2, to huggingface_hub 2.4.0.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

__all__ = ["elsewhere"]  # a fixture

KINDS = ("folder", "absolute", "local", "memory", "elsewhere", "seaweed", "moto", "hub")
PLANTED = {
    "HF_TOKEN": "hf_plantedPlantedPlanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "plantedSecretPlanted",
    "SLURM_JOB_ID": "47114711",
}
TOLD = (*PLANTED, "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "HF_ENDPOINT", "HOME", "XDG_CACHE_HOME")  # variables


@dataclass(frozen=True, slots=True)
class Out:
    """An output of some kind."""

    url: str  # as the command is given it
    read: Callable[[], Mapping[str, bytes]]  # all of its files, by name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that merges run in, with models and recipes, one with absolute paths. Not to be changed."""
    here = tmp_path_factory.mktemp("somebodys")
    write_family(here / "models", vocab=256, hidden=64)
    (here / "recipe.yml").write_text(make_recipe("ties", "models").text)
    (here / "absolute.yml").write_text(f"# once {here}/old/base\n{make_recipe('ties', here / 'models').text}")
    return here


@pytest.fixture(autouse=True)
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be there, with secrets in the environment."""
    monkeypatch.chdir(models)
    for name, value in (PLANTED | {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return models


@pytest.fixture(params=KINDS)
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Out]:
    """A place that nobody has used, of each kind."""
    kind = request.param
    with ExitStack() as stack:
        if kind in ("folder", "absolute"):
            folder = tmp_path / "out"
            yield Out(os.path.relpath(folder) if kind == "folder" else str(folder), lambda: list_files(folder))
        elif kind == "hub":
            hub: Hub = request.getfixturevalue("hub")
            stack.enter_context(use_hub(hub, tmp_path / "home"))(token=hub.token)
            yield Out("hf://org/merged", lambda: read_repo(hub))
        elif kind in ("seaweed", "moto"):
            server = request.getfixturevalue(f"{kind}_server")
            stack.enter_context(found_by_environment(server))
            prefix = new_place(server)
            yield Out(prefix.url, prefix.read)
        else:
            if kind == "elsewhere":
                request.getfixturevalue("elsewhere")
            place = make_place(kind, tmp_path)
            yield Out(place.url, place.read)


def read_repo(hub: Hub) -> dict[str, bytes]:
    commit = hub.repos["org/merged"].find_commit("main") if "org/merged" in hub.repos else None
    found = {name: hub.contents.find(file.sha256) for name, file in (commit.files if commit else {}).items()}
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


def find_told(files: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Return what files tell of this machine: the name of each, and what."""
    folders = {str(Path.cwd()), str(Path.cwd().parent), str(Path.home()), os.path.expanduser("~root")}  # noqa: PTH111
    names = {os.uname().nodename, Path("/proc/sys/kernel/random/boot_id").read_text().strip(), getpass.getuser()}
    values = {os.environ[name] for name in TOLD if os.environ.get(name)}
    told = [rf"(?<![\w-]){re.escape(each)}(?![\w-])" for each in folders | names | values]
    told.append(rf"(pid|process)\W{{1,4}}{os.getpid()}\b")
    looked = {name: data[:65536] if name.endswith(".safetensors") else data for name, data in files.items()}
    return [(name, each) for name, data in looked.items() for each in told if re.search(each.encode(), data)]


def merge_here(out: Out, recipe: str = "recipe.yml") -> int:
    return execute(["merge", recipe, out.url, "--quiet", "--workers", "0", "--shard-size", "100KB"])


def plan_here(recipe: str = "recipe.yml") -> Plan:
    return make_plan(Path(recipe), shard_size="100KB")


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    lease = f'{{"host": "{os.uname().nodename}", "pid": {os.getpid()}}}'.encode()
    assert len(find_told({"lock": lease, "recipe.yml": f"{Path.cwd()}/base".encode()})) >= 3


def test_while_a_merge_is_unfinished_it_tells_where_it_runs_and_afterwards_nothing(out: Out) -> None:
    plan, told = plan_here(), []

    def look(event: Event) -> None:
        if isinstance(event, Started) and not out.url.startswith("hf"):  # which shows nothing until the commit
            told.extend(find_told({n: data for n, data in out.read().items() if n.startswith(".mergemill/")}))

    run(plan, out.url, workers=0, threads=1, resume=f"cd {Path.cwd()} && mergemill merge", on_event=look)
    assert bool(told) != out.url.startswith("hf")
    files = out.read()
    assert {"recipe.yml", "README.md", ".mergemill/plan.json", "model.safetensors.index.json"} <= files.keys()
    assert find_told(files) == []


def test_a_finished_output_is_verified_replayed_shown_and_left_alone(
    out: Out, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_here(out) == 0
    before = out.read()
    assert find_told(before) == []
    assert merge_here(out) == 0, "the same merge is recognised as finished"
    assert execute(["verify", out.url, "--replay", "2"]) == 0
    assert execute(["status", out.url]) == 0
    assert "finished" in capsys.readouterr().out
    assert execute(["attach", out.url]) == 0
    assert execute(["abort", out.url]) == 2
    assert inspect(out.url).state == ("finished" if not out.url.startswith("hf") else inspect(out.url).state)
    seen = status(out.url).driver
    assert seen is None or (seen.host, seen.pid, seen.folder, seen.resume, seen.job) == ("", 0, "", "", "")
    capsys.readouterr()
    if "://" in out.url or Path(out.url).is_absolute():
        monkeypatch.chdir(tmp_path)
        assert execute(["verify", out.url]) == 0
        assert execute(["verify", out.url, "--replay", "2"]) == 1
        said = capsys.readouterr().err
        assert "cannot be merged again from here: " in said
        assert "paths in its recipe go from where it was merged" in said
    assert find_told({name: data for name, data in out.read().items() if name in before}) == []


def test_a_path_of_the_users_stays_in_the_recipe_alone(out: Out) -> None:
    assert merge_here(out, str(Path.cwd() / "absolute.yml")) == 0
    files = out.read()
    assert {name for name, _ in find_told(files)} == {"recipe.yml"}
    assert b"* `base`\n" in files["README.md"]
    assert execute(["verify", out.url, "--replay", "2"]) == 0


@pytest.mark.parametrize("out", ["folder", "local", "moto"], indirect=True)
def test_what_a_killed_driver_had_begun_to_note_is_not_left(out: Out, tmp_path: Path) -> None:
    plan = plan_here()

    def kill(event: Event) -> None:
        if isinstance(event, PartFinished) and event.parts_done == 3:
            raise Killed

    with suppress(Killed):
        run(plan, out.url, workers=0, threads=1, on_event=kill)
    notes = find_output(out.url).notes
    begun = {"folder": ".driver.json.tmp-0123abcd", "local": "object.tmp-0123abcd"}
    for start, name in begun.items():
        if (start == "folder" and "://" not in out.url) or out.url.startswith(f"{start}:"):
            notes.write(name, str(Path.cwd()).encode())
            assert f".mergemill/{name}" in out.read()
    run(plan, out.url, workers=0, threads=1)
    assert find_told(out.read()) == []


def test_another_merge_into_a_finished_output_is_told_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    plan = plan_here()
    run(plan, folder, workers=0)
    held = FolderOutput(folder).read_record()
    assert held is not None
    recipe = make_plan(make_recipe("linear", "models"), shard_size="100KB")
    assert "the recipe" in held.describe_difference(make_record(recipe, ENVIRONMENT))
    assert "sources" not in held.describe_difference(make_record(recipe, ENVIRONMENT))
    seeded = make_plan(Path("recipe.yml"), shard_size="100KB", seed=4)
    assert "the seed" in held.describe_difference(make_record(seeded, ENVIRONMENT))
    assert held.describe_difference(make_record(plan, ENVIRONMENT)) == "the sources, which changed since"
    with pytest.raises(OutputError, match="holds another merge, which differs in the seed"):
        run(seeded, folder, workers=0)


def test_a_recipe_of_python_is_replayed_from_what_the_output_says(tmp_path: Path) -> None:
    given = make_recipe("ties", "models")
    recipe = Recipe.model_validate(given.model_dump(mode="json", exclude_none=True))
    assert recipe.text == ""
    run(make_plan(recipe), tmp_path / "out", workers=0)
    assert verify(tmp_path / "out", replay=2).replayed == 1


def test_a_recipe_that_changed_is_not_replayed(tmp_path: Path) -> None:
    run(plan_here(), tmp_path / "out", workers=0)
    (tmp_path / "out" / "recipe.yml").write_text("merge_method: linear\n")
    with pytest.raises(VerifyError, match=r"recipe\.yml: changed since it was written"):
        verify(tmp_path / "out", replay=1)


def test_who_watches_is_told_where_the_output_is(tmp_path: Path) -> None:
    run(plan_here(), tmp_path / "out", workers=0)
    events: list[Event] = []
    committed = attach(tmp_path / "out", on_event=events.append)
    assert isinstance(events[-1], Committed)
    assert committed.out == str(tmp_path / "out")


def test_a_finished_output_tells_nothing_before_it_is_marked_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever moment the driver is killed at: what is marked as whole tells nothing."""
    folder = tmp_path / "out"

    def kill(self: object) -> None:
        assert find_told(list_files(folder)) == []
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(FolderOutput, "mark_committed", kill)
        with pytest.raises(Killed):
            run(plan_here(), folder, workers=0)
    assert status(folder).state == "unfinished"
    record = parse_record(Beneath(folder).read(".mergemill/plan.json") or b"", "")
    assert record.sources == {}
    assert run(plan_here(), folder, workers=0).redone_parts == 0
    assert hash_output(folder).keys() >= {"recipe.yml"}
    assert verify(folder, replay=2).replayed == 2

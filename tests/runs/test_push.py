"""Publishing what was merged into a folder or a bucket: on the stand-in Hub, in one commit, without what is ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs.buckets import found_by_environment, new_place
from runs.merging import Killed, hash_output, plan_merge, run_until
from servers.hub import Hub

pytest.importorskip("huggingface_hub")

from hubs import Use, use_hub

from mergemill.cli.main import execute
from mergemill.engine import push, run
from mergemill.engine.errors import OutputError
from mergemill.engine.runs.outputs.hub import TITLE
from mergemill.engine.storage.hub_upload import Content, HubRepo
from mergemill.engine.storage.store import Unavailable

# Of httpx2, to huggingface_hub 2.4.0.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

NAME = "org/merged"


@pytest.fixture(autouse=True)
def use(hub: Hub, tmp_path: Path) -> Iterator[Use]:
    """Have this process use the Hub of the test, as its owner."""
    with use_hub(hub, tmp_path / "home") as start:
        start(token=hub.token)
        yield start


@pytest.fixture(scope="module")
def merged(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge of several shards. Not to be changed."""
    out = tmp_path_factory.mktemp("push") / "out"
    run(plan_merge("linear", family, shard_size="1MB"), out, workers=0)
    return out


def read_repo(hub: Hub) -> dict[str, bytes]:
    commit = hub.repos[NAME].find_commit("main")
    assert commit
    found = {name: hub.contents.find(file.sha256) for name, file in commit.files.items() if name != ".gitattributes"}
    return {name: path.read_bytes() for name, path in found.items() if path}


def check_pushed(hub: Hub, merged: Path) -> None:
    """The repository holds what the merge wrote, named, in one commit, and nothing that tells of this machine."""
    found = read_repo(hub)
    assert found.keys() == hash_output(merged).keys()
    differ = {name for name, data in found.items() if (merged / name).read_bytes() != data}
    assert differ == {"README.md"}
    assert b"\n# merged\n" in found["README.md"]
    assert b'name = "org/merged"\n' in found["README.md"]
    assert [commit.title for commit in hub.repos[NAME].commits.values()] == ["initial commit", TITLE]
    assert [name for name, data in found.items() if name != "recipe.yml" and str(merged).encode() in data] == []


def test_a_folder_is_pushed_and_pushed_again_sends_nothing(
    hub: Hub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["push", str(merged), NAME]) == 0
    said = capsys.readouterr()
    shards = len(list(merged.glob("*.safetensors")))
    assert f"uploading model-00001-of-0000{shards}.safetensors (1 of {shards})" in said.err
    assert said.out.startswith(f"hf://{NAME}: ")
    check_pushed(hub, merged)
    assert hub.repos[NAME].private
    assert push(merged, f"hf://{NAME}").sent_bytes == 0
    check_pushed(hub, merged)


def test_a_push_that_was_killed_sends_only_what_is_missing(
    hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    upload = HubRepo.upload

    def note(self: HubRepo, content: Content, *more: Any) -> None:
        upload(self, content, *more)
        sent.append(content.name)
        if len(sent) == 2:
            raise Killed

    monkeypatch.setattr(HubRepo, "upload", note)
    with pytest.raises(Killed):
        push(merged, NAME, public=True)
    assert read_repo(hub) == {}
    push(merged, NAME, public=True)
    assert not hub.repos[NAME].private
    assert len(sent) == len(set(sent)) == len(list(merged.glob("*.safetensors")))
    check_pushed(hub, merged)


def test_a_commit_whose_answer_is_lost_is_made_once(hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = HubRepo.commit

    def lose(*args: Any) -> None:
        commit(*args)
        raise Unavailable("the answer is lost")

    monkeypatch.setattr(HubRepo, "commit", lose)
    push(merged, NAME)
    check_pushed(hub, merged)


def test_a_bucket_is_pushed(hub: Hub, merged: Path, family: Path, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("moto_server")
    with found_by_environment(server):
        place = new_place(server)
        run(plan_merge("linear", family, part_bytes=8 << 20, shard_size="1MB"), place.url, workers=0)
        push(place.url, NAME)
    check_pushed(hub, merged)


def test_what_is_no_finished_merge_is_refused(hub: Hub, merged: Path, family: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no merge that mergemill wrote"):
        push(family / "A", NAME)
    run_until(plan_merge("linear", family, shard_size="1MB"), tmp_path / "out", 1)
    with pytest.raises(OutputError, match=r"is unfinished; run the same merge again to finish it, then push it"):
        push(tmp_path / "out", NAME)
    with pytest.raises(OutputError, match=r"is on the Hub already"):
        push(f"hf://{NAME}", "org/other")
    assert NAME not in hub.repos
    hub.add_repo(NAME, {"config.json": b"{}"}, private=True)
    with pytest.raises(OutputError, match=r"hf://org/merged: holds 'config.json'; the output must be a repository"):
        push(merged, NAME)

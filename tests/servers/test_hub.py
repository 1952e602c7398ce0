"""The Hub of the tests: its own client takes it for the Hub."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from servers import faults
from servers.hub import Hub
from servers.proxy import start_proxy

pytest.importorskip("huggingface_hub")

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

WEIGHTS = bytes(i * 7 % 251 for i in range(200_000))
FILES: dict[str, bytes | Path] = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "extra/notes.txt": b"notes",
}
NAME = "org/model"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the client from Xet, which the stand-in does not speak, from bars, and from a token of the user."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    disable_progress_bars()


def open_api(hub: Hub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def read(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        content: bytes = answer.read()
        return content


def test_a_model_is_described(hub: Hub) -> None:
    first = hub.add_repo(NAME, FILES)
    second = hub.add_commit(NAME, {"config.json": b"{}", "extra/notes.txt": None})
    api = open_api(hub)
    assert (api.model_info(NAME).sha, api.model_info(NAME, revision=first).sha) == (second, first)
    siblings = {each.rfilename: each for each in api.model_info(NAME, files_metadata=True).siblings or ()}
    assert set(siblings) == {".gitattributes", "config.json", "model.safetensors"}
    assert siblings["model.safetensors"].size == len(WEIGHTS)
    assert [each.commit_id for each in api.list_repo_commits(NAME)] == [second, first]
    [weights, folder] = api.get_paths_info(NAME, ["model.safetensors", "extra", "nothing"], revision=first)
    assert isinstance(weights, RepoFile)
    assert weights.lfs
    assert weights.lfs.sha256 == hub.repos[NAME].commits[first].files["model.safetensors"].sha256
    assert folder.path == "extra"
    assert hub.journal.count()["info"] == 3


def test_a_tree_comes_in_pages(hub: Hub) -> None:
    hub.page_entries = 2
    hub.add_repo(NAME, FILES)
    api = open_api(hub)
    paths = [each.path for each in api.list_repo_tree(NAME, recursive=True)]
    assert paths == [".gitattributes", "config.json", "extra", "extra/notes.txt", "model.safetensors"]
    assert hub.journal.count()["tree"] == 3
    assert [each.path for each in api.list_repo_tree(NAME, "extra")] == ["extra/notes.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(NAME, "nothing"))


def test_files_are_downloaded_and_read_by_range(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add_repo(NAME, FILES)
    path = hf_hub_download(NAME, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "cache", token=False)
    assert Path(path).read_bytes() == WEIGHTS
    folder = Path(snapshot_download(NAME, endpoint=hub.url, cache_dir=tmp_path / "cache", token=False))
    assert folder.name == sha
    assert (folder / "extra/notes.txt").read_bytes() == b"notes"
    system = HfFileSystem(endpoint=hub.url, token=False, skip_instance_cache=True)
    listed = {f"{NAME}/{name}" for name in (".gitattributes", "config.json", "extra", "model.safetensors")}
    assert set(system.ls(NAME, detail=False)) == listed
    assert system.info(f"{NAME}/model.safetensors")["size"] == len(WEIGHTS)
    assert system.cat_file(f"{NAME}@{sha}/model.safetensors", start=1000, end=3000) == WEIGHTS[1000:3000]
    assert system.cat_file(f"{NAME}/config.json", start=2, end=7) == b"model"
    assert hub.journal.find_ranges(f"/{NAME}/resolve/main/config.json")[-1] == (2, 23)  # it reads ahead
    assert hub.journal.exchanges[-1].request.kind == "small"


def test_a_large_file_is_behind_a_signed_address_that_runs_out(hub: Hub) -> None:
    sha = hub.add_repo(NAME, FILES)
    found = get_hf_file_metadata(hf_hub_url(NAME, "model.safetensors", endpoint=hub.url), token=False)
    assert (found.commit_hash, found.size) == (sha, len(WEIGHTS))
    assert found.etag == hub.repos[NAME].commits[sha].files["model.safetensors"].sha256
    assert found.location.startswith(hub.cdn_url)
    assert read(found.location, Range="bytes=5-8") == WEIGHTS[5:9]
    hub.expire_locations()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        read(found.location)
    hub.lifetime_s = -1
    with pytest.raises(urllib.error.HTTPError, match="403"):
        read(hf_hub_url(NAME, "model.safetensors", endpoint=hub.url))
    hub.lifetime_s = 60
    assert read(hf_hub_url(NAME, "model.safetensors", endpoint=hub.url)) == WEIGHTS
    with pytest.raises(urllib.error.HTTPError, match="400"):
        read(found.location, Authorization=f"Bearer {hub.token}")


@pytest.mark.parametrize("redirects", [True, False])
def test_a_small_file_comes_from_the_hub_itself(hub: Hub, redirects: bool) -> None:
    hub.redirects_small = redirects
    sha = hub.add_repo(NAME, FILES, private=True)
    url = hf_hub_url(NAME, "extra/notes.txt", endpoint=hub.url)
    found = get_hf_file_metadata(url, token=hub.token)
    assert (found.commit_hash, found.size) == (sha, 5)
    assert found.etag == hub.repos[NAME].commits[sha].files["extra/notes.txt"].git_oid
    assert (found.location != url) == redirects
    assert read(found.location, Authorization=f"Bearer {hub.token}", Range="bytes=1-2") == b"ot"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        read(found.location)


@pytest.mark.parametrize(("token", "status"), [("", 401), ("stranger", 404), ("invalid", 401)])
def test_a_private_model_is_there_for_its_owner_only(hub: Hub, token: str, status: int) -> None:
    hub.add_repo(NAME, FILES, private=True)
    assert open_api(hub, hub.token).model_info(NAME).private is True
    with pytest.raises(HfHubHTTPError) as caught:
        open_api(hub, getattr(hub, token, token) or False).model_info(NAME)
    assert caught.value.response.status_code == status
    assert isinstance(caught.value, RepositoryNotFoundError) == (token != "invalid")


def test_a_gated_model_is_seen_and_not_read(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(NAME, FILES, gated=True)
    for token in (False, hub.stranger):
        assert open_api(hub, token).model_info(NAME).gated == "manual"
        with pytest.raises(GatedRepoError):
            hf_hub_download(NAME, "config.json", endpoint=hub.url, cache_dir=tmp_path, token=token)
    assert hf_hub_download(NAME, "config.json", endpoint=hub.url, cache_dir=tmp_path, token=hub.token)


def test_what_is_not_there_is_told_apart(hub: Hub) -> None:
    hub.add_repo(NAME, FILES)
    api = open_api(hub)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="none")
    with pytest.raises(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(NAME, "none", endpoint=hub.url))


def test_a_branch_moves_while_it_is_read(hub: Hub, tmp_path: Path) -> None:
    first = hub.add_repo(NAME, FILES)
    url = hf_hub_url(NAME, "config.json", endpoint=hub.url)
    second = hub.add_commit(NAME, {"config.json": b"{}"})
    assert read(url) == b"{}"
    hub.move_branch(NAME, "main", first)
    assert read(url) == FILES["config.json"]
    open_api(hub, hub.token).create_branch(NAME, branch="refs/pr/1", revision=second)
    assert open_api(hub).model_info(NAME, revision="refs/pr/1").sha == second


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of httpx2, to huggingface_hub 2.4.0
@pytest.mark.parametrize("part_bytes", [1 << 30, 70_000])
def test_shards_are_uploaded_before_the_commit(hub: Hub, tmp_path: Path, part_bytes: int) -> None:
    hub.part_bytes = part_bytes
    api = open_api(hub, hub.token)
    assert api.create_repo(NAME, private=True).repo_id == NAME
    assert hub.repos[NAME].private
    shard = tmp_path / "shard"
    shard.write_bytes(WEIGHTS)
    large = CommitOperationAdd("model-1.safetensors", shard)
    api.preupload_lfs_files(NAME, [large])
    again = CommitOperationAdd("model-2.safetensors", WEIGHTS)
    small = CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n")
    done = api.create_commit(NAME, [large, again, small], commit_message="a merge")
    assert hub.journal.count()["cdn_put"] == (3 if part_bytes == 70_000 else 1)
    files = hub.repos[NAME].commits[done.oid].files
    assert set(files) == {".gitattributes", "README.md", "model-1.safetensors", "model-2.safetensors"}
    assert files["model-1.safetensors"].large
    assert not files["README.md"].large
    system = HfFileSystem(endpoint=hub.url, token=hub.token, skip_instance_cache=True)
    assert system.cat_file(f"{NAME}/model-2.safetensors") == WEIGHTS


def test_a_commit_needs_what_it_points_to_and_the_parent_it_names(hub: Hub) -> None:
    first = hub.add_repo(NAME, FILES)
    hub.add_commit(NAME, {"config.json": b"{}"})
    api = open_api(hub, hub.token)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=NAME, parent_commit=first)
    lost = CommitOperationAdd("lost.safetensors", WEIGHTS + b"!")
    lost._is_uploaded = True
    lost._upload_mode = "lfs"
    with pytest.raises(HfHubHTTPError, match="not been uploaded"):
        api.create_commit(NAME, [lost], commit_message="lost")
    with pytest.raises(HfHubHTTPError, match="403"):
        open_api(hub, hub.stranger).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=NAME)
    api.create_commit(NAME, [CommitOperationDelete("extra/")], commit_message="tidy")
    assert not api.file_exists(NAME, "extra/notes.txt")


def test_faults_come_between_the_hub_and_its_client(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(NAME, FILES)
    with start_proxy(hub.cdn_url, faults.at_first(1, faults.truncate_after(50_000), "cdn")) as storage:
        hub.cdn_url = storage.url
        with start_proxy(hub.url, faults.at_first(1, faults.refuse(503), "tree")) as front:
            folder = snapshot_download(NAME, endpoint=front.url, cache_dir=tmp_path, token=False)
        assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
        assert front.journal.count()["tree"] == 2
        assert storage.journal.count_faults() == {"truncate": 1}
        assert storage.journal.count()["cdn"] == 2


def test_a_process_finds_the_hub_by_its_environment(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(NAME, FILES, private=True)
    script = f"""
import huggingface_hub, json
path = huggingface_hub.hf_hub_download({NAME!r}, "config.json")
print(json.dumps([huggingface_hub.whoami()["name"], open(path).read()]))
"""
    environ = hub.make_environ(tmp_path / "home", token=hub.token)
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    said: Any = json.loads(done.stdout)
    assert said == ["owner", '{"model_type": "llama"}']

"""Models of the Hub: pinned to a commit, read from where its storage has them or from its cache, never as another."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from models import write_llama
from servers import faults
from servers.asked import Request
from servers.faults import Fault
from servers.hub import Hub
from servers.origin import start_origin
from servers.proxy import start_proxy

pytest.importorskip("huggingface_hub")

from hubs import Use, use_hub
from huggingface_hub import constants, snapshot_download

from mergemill.engine import make_plan
from mergemill.engine.checkpoint import open_checkpoint
from mergemill.engine.errors import CheckpointError, MergemillError, SourceChanged, StorageError
from mergemill.engine.storage import fetch, hub_upload, tries
from mergemill.engine.storage.ranges import Pin, close_all, list_files, pin_file, read_into, read_whole
from mergemill.engine.storage.store import store_of

WEIGHTS = bytes(i * 7 % 251 for i in range(300_000))
FILES: dict[str, bytes | Path] = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "additional_chat_templates/tool.jinja": b"{{ tool }}",
    "extra/deep/notes.txt": b"notes",
    "sub/config.json": b"{}",
    "sub/model.safetensors": WEIGHTS[:1000],
}
NAME = "org/model"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the Hub's client keeps its cache and token in this test."""
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def use(hub: Hub, home: Path) -> Iterator[Use]:
    """Have this process start anew with the Hub of the test, or as the test says."""
    with use_hub(hub, home) as start:
        yield start


@pytest.fixture
def message_of(hub: Hub) -> Callable[..., str]:
    """Return the message of the error that a call raises: one line, without a token."""

    def message(act: Callable[..., Any], *arguments: Any, kind: type[MergemillError] = CheckpointError) -> str:
        with pytest.raises(kind) as caught:
            act(*arguments)
        said = str(caught.value)
        assert "\n" not in said
        assert "hf_" not in said
        assert "Signature" not in said
        return said

    return message


def resolve(url: str = f"hf://{NAME}", revision: str | None = None) -> str:
    return store_of(url).resolve(url, revision)


def pin_all(url: str = f"hf://{NAME}") -> dict[str, Pin]:
    found = list_files(resolve(url), "additional_chat_templates")
    assert found is not None
    return dict(found)


def download(hub: Hub, **more: Any) -> Path:
    """Put a model into the cache as its client does."""
    return Path(snapshot_download(NAME, endpoint=hub.url, token=hub.token, **more))


def test_a_model_is_pinned_to_a_commit_by_one_request(hub: Hub) -> None:
    sha = hub.add_repo(NAME, FILES)
    assert resolve() == f"hf://{NAME}@{sha}"
    pins = pin_all()
    weights = hub.repos[NAME].commits[sha].files["model.safetensors"]
    config = hub.repos[NAME].commits[sha].files["config.json"]
    assert set(pins) == {
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "additional_chat_templates/tool.jinja",
    }
    place = f"hf://{NAME}@{sha}"
    assert pins["model.safetensors"] == Pin(f"{place}/model.safetensors", 300_000, f"sha256:{weights.sha256}")
    assert pins["config.json"] == Pin(f"{place}/config.json", 23, f"git:{config.git_oid}")
    assert pin_file(f"{place}/sub/config.json").size_bytes == 2
    assert hub.journal.count() == {"info": 2}  # `resolve` is asked twice here


def test_a_folder_and_a_file_of_a_model_have_urls(hub: Hub, message_of: Callable[..., str]) -> None:
    sha = hub.add_repo(NAME, FILES)
    place = resolve(f"hf://{NAME}/sub/")
    assert place == f"hf://{NAME}@{sha}/sub"
    assert set(list_files(place, "x") or ()) == {"config.json", "model.safetensors"}
    assert list_files(f"hf://{NAME}@{sha}/sub/model.safetensors", "x") is None
    assert message_of(list_files, f"hf://{NAME}@{sha}/none", "x") == (
        f"hf://{NAME}@{sha}/none: {NAME} has no file or folder 'none' at this commit"
    )
    assert message_of(pin_file, f"hf://{NAME}@{sha}/none") == f"hf://{NAME}@{sha}/none: no such file at this commit"


@pytest.mark.parametrize("redirects", [True, False])
def test_ranges_come_from_where_the_hub_says_once_a_file(hub: Hub, use: Use, redirects: bool) -> None:
    hub.redirects_small = redirects
    hub.add_repo(NAME, FILES, private=True)
    use(token=hub.token)
    pins = pin_all()
    for start in range(0, 3_000, 100):
        buffer = bytearray(b"\xff" * 116)
        read_into(pins["model.safetensors"], start, memoryview(buffer)[8:108])
        assert buffer == b"\xff" * 8 + WEIGHTS[start : start + 100] + b"\xff" * 8
    assert hub.journal.count() == {"info": 1, "resolve": 1, "cdn": 30}
    assert read_whole(pins["config.json"]) == FILES["config.json"]
    assert read_whole(pins["additional_chat_templates/tool.jinja"]) == b"{{ tool }}"
    sent = {each.request.kind: "authorization" in each.request.headers for each in hub.journal.exchanges}
    assert sent == {"info": True, "resolve": True, "cdn": False} | ({"small": True} if redirects else {})


def test_many_threads_ask_where_a_file_is_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIECE_BYTES", 5_000)
    hub.add_repo(NAME, FILES)
    pin = pin_all()["model.safetensors"]
    assert read_whole(pin) == WEIGHTS
    assert hub.journal.count() == {"info": 1, "resolve": 1, "cdn": 60}
    hub.expire_locations()
    assert read_whole(pin) == WEIGHTS
    assert hub.journal.count()["resolve"] == 2


def test_an_address_that_ran_out_is_asked_for_again(hub: Hub, message_of: Callable[..., str]) -> None:
    hub.add_repo(NAME, FILES)
    pin = pin_all()["model.safetensors"]
    for times in (1, 2, 3):
        assert read_whole(pin) == WEIGHTS
        assert hub.journal.count()["resolve"] == times
        hub.expire_locations()
    hub.lifetime_s = -1
    assert message_of(read_whole, pin, kind=StorageError) == (
        f"{pin.url}: reading at byte 0 failed 8 times, at last with: the address that the Hub gave for it is refused "
        "(403)"
    )


def test_a_branch_that_moves_after_planning_changes_nothing(hub: Hub) -> None:
    first = hub.add_repo(NAME, FILES)
    pins = pin_all()
    second = hub.add_commit(NAME, {"config.json": b"{}", "model.safetensors": None})
    assert read_whole(pins["config.json"]) == FILES["config.json"]
    assert read_whole(pins["model.safetensors"]) == WEIGHTS
    assert [resolve(), resolve(revision=first), resolve(f"hf://{NAME}@{first}")] == [
        f"hf://{NAME}@{second}",
        f"hf://{NAME}@{first}",
        f"hf://{NAME}@{first}",
    ]
    hub.repos[NAME].branches["refs/pr/1"] = first
    assert resolve(f"hf://{NAME}@refs/pr/1/sub") == f"hf://{NAME}@{first}/sub"
    assert resolve(revision="refs/pr/1") == f"hf://{NAME}@{first}"


def test_a_private_model_needs_its_owners_token(hub: Hub, use: Use, message_of: Callable[..., str]) -> None:
    sha = hub.add_repo(NAME, FILES, private=True)
    place = f"hf://{NAME}: no such model on the Hub at {hub.url}, or a private one that"
    assert message_of(resolve) == f"{place} needs a token; log in: hf auth login"
    use(token=hub.stranger)
    assert message_of(resolve) == f"{place} the token used here may not read"
    use(token="hf_invalid")
    assert message_of(resolve) == f"hf://{NAME}: the Hub at {hub.url} does not know the token used here; log in: " + (
        "hf auth login"
    )
    use(token=hub.token)
    assert resolve() == f"hf://{NAME}@{sha}"
    assert hub.token not in repr(pin_all())


def test_the_token_of_hf_auth_login_is_found(hub: Hub, home: Path) -> None:
    sha = hub.add_repo(NAME, FILES, private=True)
    home.mkdir()
    (home / "token").write_text(hub.token)
    assert resolve() == f"hf://{NAME}@{sha}"


def test_a_gated_model_says_where_its_terms_are(hub: Hub, use: Use, message_of: Callable[..., str]) -> None:
    sha = hub.add_repo(NAME, FILES, gated=True)
    place = f"hf://{NAME}@{sha}/config.json: is gated; accept its terms at {hub.url}/{NAME}"
    pin = pin_all()["config.json"]
    assert message_of(read_whole, pin, kind=StorageError) == f"{place} and log in: hf auth login"
    assert message_of(open_checkpoint, NAME) == (
        place.replace("config.json", "model.safetensors") + " and log in: hf auth login"
    )
    use(token=hub.stranger)
    assert message_of(read_whole, pin, kind=StorageError) == f"{place} with the account whose token is used here"
    use(token=hub.token)
    assert read_whole(pin) == FILES["config.json"]


def test_what_is_not_there_is_named(hub: Hub, message_of: Callable[..., str]) -> None:
    hub.add_repo(NAME, FILES)
    assert message_of(resolve, "hf://org/none") == (
        f"hf://org/none: no such model on the Hub at {hub.url}, or a private one that needs a token; "
        "log in: hf auth login"
    )
    assert message_of(resolve, f"hf://{NAME}", "none") == (
        f"hf://{NAME}@none: has no revision 'none'; its branches and tags are at {hub.url}/{NAME}/tree/main"
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://gpt2", "a model on the Hub is written hf://org/name[@revision][/folder]"),
        ("hf://org/na--me", "a model on the Hub is written hf://org/name[@revision][/folder]"),
        ("hf://org/name@", "a model on the Hub is written hf://org/name[@revision][/folder]"),
        ("hf://datasets/org/name", "datasets of the Hub cannot be merged; a model is written hf://org/name"),
        ("hf://spaces/org/name", "spaces of the Hub cannot be merged; a model is written hf://org/name"),
    ],
)
def test_a_url_of_no_model_says_how_one_is_written(
    hub: Hub, url: str, words: str, message_of: Callable[..., str]
) -> None:
    assert message_of(resolve, url) == f"{url}: {words}"
    assert hub.journal.exchanges == ()


def test_a_revision_is_given_once(hub: Hub, message_of: Callable[..., str]) -> None:
    assert message_of(resolve, f"hf://{NAME}@a", "b") == f"hf://{NAME}@a@b: two revisions, 'a' and 'b'; give one"


def test_a_web_server_that_is_no_hub_is_named(use: Use, message_of: Callable[..., str]) -> None:
    with start_origin() as origin:
        origin.files[f"/api/models/{NAME}?blobs=true"] = b"{}"
        use(origin.url)
        assert message_of(resolve) == (
            f"hf://{NAME}: the Hub at {origin.url} does not answer as the Hub does; check HF_ENDPOINT"
        )


def test_a_folder_here_comes_before_a_model_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message_of: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    here = write_llama(tmp_path / "other", seed=1, layers=1)
    hub.add_repo(NAME, {path.name: path for path in here.iterdir()})
    there = open_checkpoint(NAME, "main")
    assert there.path.startswith(f"hf://{NAME}@")
    assert there.tensors.keys() == open_checkpoint(str(here)).tensors.keys()
    here.rename(tmp_path / "org")
    (tmp_path / "org").rename(tmp_path / "model")
    (tmp_path / "org").mkdir()
    (tmp_path / "model").rename(tmp_path / NAME)
    assert open_checkpoint(NAME).path == str(tmp_path / NAME)
    assert message_of(open_checkpoint, NAME, "main").endswith("a folder has no revisions; only models on the Hub have")
    assert message_of(open_checkpoint, "org/none").startswith("org/none: no such folder; hf://org/none: no such model")


def test_a_cached_model_is_read_without_the_hub(hub: Hub, message_of: Callable[..., str]) -> None:
    hub.add_repo(NAME, FILES)
    download(hub)
    pins = pin_all()
    before = hub.journal.count()
    for name in ("model.safetensors", "config.json"):
        assert read_whole(pins[name]) == FILES[name]
    buffer = bytearray(100)
    read_into(pins["model.safetensors"], 777, memoryview(buffer))
    assert buffer == WEIGHTS[777:877]
    assert hub.journal.count() == before


def test_a_cached_file_that_is_not_the_pinned_one_is_left_alone(hub: Hub) -> None:
    hub.add_repo(NAME, FILES)
    pins = pin_all()
    folder = download(hub)
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent.parent / "blobs" / ("0" * 40))
    (folder.parent.parent / "blobs" / ("0" * 40)).write_bytes(b"x" * pins["config.json"].size_bytes)
    close_all()
    assert read_whole(pins["model.safetensors"]) == WEIGHTS
    assert read_whole(pins["config.json"]) == FILES["config.json"]


def test_a_model_of_the_hub_and_its_folder_in_the_cache_are_one_model(hub: Hub, tmp_path: Path) -> None:
    here = write_llama(tmp_path / "other", seed=1, layers=1)
    hub.add_repo(NAME, {path.name: path for path in here.iterdir()})
    models = [{"model": model, "parameters": {"weight": 1}} for model in (f"hf://{NAME}", str(download(hub)))]
    plan = make_plan({"merge_method": "linear", "models": models})
    assert len(plan.sources) == 1
    assert "is the same model as" in plan.warnings[0]


@pytest.mark.parametrize("away", ["forbidden", "unreachable"])
def test_without_the_hub_a_cached_model_has_the_same_pins(hub: Hub, use: Use, away: str) -> None:
    sha = hub.add_repo(NAME, FILES)
    online = pin_all()
    sub = pin_all(f"hf://{NAME}/sub")
    download(hub)
    before = hub.journal.count()
    use(hub.url if away == "forbidden" else "http://127.0.0.1:9", offline=away == "forbidden")
    assert resolve() == resolve(revision="main") == resolve(revision=sha) == f"hf://{NAME}@{sha}"
    assert pin_all() == online
    assert pin_all(f"hf://{NAME}/sub") == sub
    assert pin_file(f"hf://{NAME}@{sha}/extra/deep/notes.txt").size_bytes == 5
    assert read_whole(online["model.safetensors"]) == WEIGHTS
    assert hub.journal.count() == before


def test_a_cache_without_links_pins_by_the_commit_and_is_read_all_the_same(hub: Hub, use: Use) -> None:
    sha = hub.add_repo(NAME, FILES)
    online = pin_all()
    folder = download(hub)
    for path in [path for path in folder.rglob("*") if path.is_symlink()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    use(offline=True)
    offline = pin_all()
    assert {pin.stamp for pin in offline.values()} == {f"commit:{sha}"}
    for pins in (online, offline):
        assert read_whole(pins["model.safetensors"]) == WEIGHTS
    use()
    (folder / "model.safetensors").unlink()
    assert read_whole(offline["model.safetensors"]) == WEIGHTS


def test_without_the_hub_a_model_that_is_not_whole_in_the_cache_is_named(
    hub: Hub, use: Use, tmp_path: Path, message_of: Callable[..., str]
) -> None:
    write_llama(tmp_path / "m", seed=1, layers=1, shards=3)
    sha = hub.add_repo(NAME, {path.name: path for path in (tmp_path / "m").iterdir()})
    use(offline=True)
    why = "the Hub may not be asked (HF_HUB_OFFLINE), and its cache"
    assert message_of(open_checkpoint, f"hf://{NAME}") == (
        f"hf://{NAME}: {why} has no such model; when it can: hf download {NAME}"
    )
    use()
    pin = pin_all()["model-00003-of-00003.safetensors"]
    download_some = ["*.json", "model-00001*"]
    folder = download(hub, allow_patterns=download_some)
    use(offline=True)
    fetch_it = f"when it can: hf download {NAME} --revision {sha}"
    assert message_of(open_checkpoint, NAME) == (
        f"hf://{NAME}@{sha}: {why} lacks model-00002-of-00003.safetensors and 1 more; {fetch_it}"
    )
    assert message_of(read_whole, pin, kind=StorageError) == f"{pin.url}: {why} does not have the file"
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00003.safetensors").unlink()
    use(offline=True)
    assert message_of(open_checkpoint, NAME) == f"hf://{NAME}@{sha}: {why} lacks its weights; {fetch_it}"


def test_a_hub_that_is_away_is_not_asked_for_every_model(
    use: Use, message_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use("http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr(tries.time, "sleep", waits.append)
    for name in "abc":
        assert "cannot be reached (ConnectError" in message_of(resolve, f"hf://org/{name}")
    assert len(waits) == tries.BEFORE.attempts - 1


def test_faults_of_the_hub_and_its_storage_change_no_byte(hub: Hub, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PIECE_BYTES", 5_000)
    hub.add_repo(NAME, FILES)
    storm = [
        faults.refuse(500),
        faults.refuse(503),
        faults.refuse(429),
        faults.expire(),
        faults.start_slowly(0.05),
        faults.reset_after(2_000),
        faults.truncate_after(3_000),
        faults.lose_answer(),
        faults.change_length(-7),
    ]

    def front(request: Request) -> Fault | None:
        return [faults.refuse(503), faults.lose_answer(), None][request.attempt % 3]

    with (
        start_proxy(hub.cdn_url, faults.at_random(1, 0.4, storm)) as storage,
        start_proxy(hub.url, front) as hub_front,
    ):
        hub.cdn_url = storage.url
        use(hub_front.url)
        pins = pin_all()
        for _ in range(3):
            assert read_whole(pins["model.safetensors"]) == WEIGHTS
            assert read_whole(pins["config.json"]) == FILES["config.json"]
        assert len(storage.journal.count_faults()) == len(storm)
        close_all()


@pytest.mark.parametrize("fault", [faults.change_etag(), faults.change_bytes()])
def test_another_content_at_the_storage_is_never_read(hub: Hub, fault: Fault, message_of: Callable[..., str]) -> None:
    hub.add_repo(NAME, FILES)
    with start_proxy(hub.cdn_url, lambda request: fault if request.range == (1000, 1004) else None) as storage:
        hub.cdn_url = storage.url
        pin = pin_all()["model.safetensors"]
        read_into(pin, 0, memoryview(bytearray(10)))
        message = message_of(read_into, pin, 1000, memoryview(bytearray(4)), kind=SourceChanged)
        close_all()
    assert message.startswith(f"{pin.url}: changed since the plan was made: 300000 bytes, sha256:")


@pytest.mark.parametrize("field", ["size_bytes", "stamp", "url"])
def test_a_file_that_is_not_as_it_was_pinned_is_not_read(hub: Hub, field: str, message_of: Callable[..., str]) -> None:
    sha = hub.add_repo(NAME, FILES)
    others = {"size_bytes": 299_999, "stamp": f"sha256:{'0' * 64}", "url": f"hf://{NAME}@{sha}/gone.safetensors"}
    for name in ("model.safetensors", "config.json"):
        pin = dataclasses.replace(pin_all()[name], **{field: others[field]})
        assert "changed since the plan was made" in message_of(
            lambda pin=pin: read_into(pin, 0, memoryview(bytearray(4))), kind=SourceChanged
        )


def test_two_processes_worth_of_stores_read_at_once(hub: Hub) -> None:
    hub.add_repo(NAME, FILES)
    pins = pin_all()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(read_whole, [pins["model.safetensors"], pins["config.json"]] * 16))
    assert set(read) == {WEIGHTS, FILES["config.json"]}
    assert hub.journal.count()["resolve"] == 2


def test_the_environment_of_a_process_names_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    close_all()
    sha = hub.add_repo(NAME, FILES)
    assert resolve() == f"hf://{NAME}@{sha}"
    assert os.environ["HF_ENDPOINT"] != constants.ENDPOINT


def test_a_library_without_the_fields_that_say_that_a_file_is_uploaded_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else its commit would upload nothing in the place of a shard."""

    @dataclasses.dataclass
    class Addition:
        path_in_repo: str
        path_or_fileobj: bytes

    monkeypatch.setattr(hub_upload, "CommitOperationAdd", Addition)
    content = hub_upload.Content("model.safetensors", 3, "00" * 32)
    with pytest.raises(StorageError, match=r"huggingface_hub [\d.]+: has no CommitOperationAdd\._upload_mode, "):
        hub_upload._make_addition(content)

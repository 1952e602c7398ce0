"""What cannot be asked for is not taken for gone: with the Hub or a bucket down nobody is told to remove anything."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hubs import Use, use_hub
from huggingface_hub import snapshot_download
from runs.buckets import new_place
from runs.merging import plan_merge
from servers.hub import Hub
from servers.s3 import S3

from mergemill.engine import abort, run, verify
from mergemill.engine.errors import Absent, CheckpointError, MergemillError, VerifyError
from mergemill.engine.runs.status import status
from mergemill.engine.storage.hub_errors import LOST
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.storage.store import Options

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

NOWHERE = "http://127.0.0.1:9"
URL = "hf://org/merged"
DOWN: Options = {"s3": {"endpoint_url": NOWHERE}}


@pytest.fixture
def use(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Have this process use the Hub of the test, as its owner."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with use_hub(hub, tmp_path / "home") as start:
        start(token=hub.token)
        yield start


def check_advice(ask: Callable[[], object]) -> str:
    """Return the error, which says nothing of what is gone, or of removing it."""
    with pytest.raises(MergemillError) as caught:
        ask()
    assert "remove" not in str(caught.value)
    assert "gone" not in str(caught.value)
    return str(caught.value)


def test_with_the_hub_down_nothing_is_said_to_be_gone(hub: Hub, use: Use, family: Path) -> None:
    run(plan_merge("linear", family), URL, workers=0)
    use(NOWHERE, hub.token)
    for ask in (verify, status):
        assert "cannot be reached" in check_advice(lambda ask=ask: ask(URL))
    assert "there is nothing to abort" in check_advice(lambda: abort(URL))
    use(token=hub.token)
    assert verify(URL).shards


def test_a_cache_that_lacks_a_shard_is_no_repository_that_does(hub: Hub, use: Use, family: Path) -> None:
    run(plan_merge("linear", family), URL, workers=0)
    snapshot_download("org/merged", allow_patterns=[".mergemill/*"], endpoint=hub.url, token=hub.token)
    use(NOWHERE, hub.token)
    message = check_advice(lambda: verify(URL))
    assert "cannot be reached" in message
    assert "its cache lacks it" in message


def test_a_shard_that_the_hub_does_not_have_is_gone(hub: Hub, use: Use, family: Path) -> None:
    run(plan_merge("linear", family), URL, workers=0)
    hub.add_commit("org/merged", {"model-00001-of-00001.safetensors": None})
    use(token=hub.token)
    with pytest.raises(VerifyError, match="is gone; remove the folder and merge again"):
        verify(URL)


def test_with_the_bucket_down_nothing_is_said_to_be_gone(s3: S3, family: Path) -> None:
    out = new_place(s3)
    run(plan_merge("linear", family, part_bytes=16 << 20), out.url, workers=0)
    for ask in (verify, status, abort):
        assert "cannot be reached" in check_advice(lambda ask=ask: ask(out.url, storage_options=DOWN))
    out.delete("model-00001-of-00001.safetensors")
    with pytest.raises(VerifyError, match="is gone; remove the folder and merge again"):
        verify(out.url, storage_options={})


def test_only_what_storage_says_is_not_there_is_absent(s3: S3, tmp_path: Path) -> None:
    place = new_place(s3)
    for url in (f"{place.url}/none", str(tmp_path / "none"), "memory://m/none"):
        with pytest.raises(Absent):
            pin_file(url)
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        pin_file(f"{NOWHERE}/none")
    assert not isinstance(caught.value, Absent)


def test_what_counts_as_a_lost_connection_to_the_hub_is_no_bug_of_ours() -> None:
    for error in (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, Exception):
        assert not issubclass(error, LOST)

"""Which files a model on the Hub has: from the Hub, or from its cache where that is out of reach."""

import time
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from mergemill.engine.errors import Absent, CheckpointError
from mergemill.engine.storage import hub_cache
from mergemill.engine.storage.hub_errors import Offline, explained
from mergemill.engine.storage.hub_place import HubPlace
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.store import Unavailable
from mergemill.engine.storage.tries import BEFORE, ask_patiently

ANSWER_S = 10.0  # how long the Hub may be silent
SILENT_S = 60.0  # for how long it is not asked again once it could not be reached


class Listing:
    """The files of commits, each asked for once in a process: they never change."""

    def __init__(self, api: HfApi) -> None:
        self._api = api
        self._files: dict[tuple[str, str], Mapping[str, Pin]] = {}  # by repository and commit
        self._snapshots: dict[tuple[str, str], tuple[Path, str]] = {}  # where the cache was asked: its folder, and why
        self._unreachable: tuple[float, str] = (0.0, "")  # until when the Hub is not asked again, and why

    def find_commit(self, place: HubPlace) -> str:
        """Return the commit that a revision is now."""
        until_s, why = self._unreachable
        if time.monotonic() >= until_s:
            try:
                return ask_patiently(lambda: self._ask(place), BEFORE)
            except Offline as error:
                why = str(error)
            except Unavailable as error:
                why = str(error)
                self._unreachable = time.monotonic() + SILENT_S, why
        return self._look_up(place, why)

    def list_files(self, place: HubPlace) -> Mapping[str, Pin]:
        """Return all files of a commit by their paths."""
        assert place.revision
        if (place.repo, place.revision) not in self._files:
            self.find_commit(place)
        return self._files[place.repo, place.revision]

    def check_whole(self, place: HubPlace, files: Mapping[str, Pin]) -> None:
        """Raise unless the files of a folder are all there, where the cache was asked for them."""
        assert place.revision
        if found := self._snapshots.get((place.repo, place.revision)):
            folder, why = found
            if lacks := hub_cache.find_missing(folder / place.path, files):
                raise CheckpointError(f"{place}: {why}, and its cache lacks {lacks}; when it can: {place.download}")

    def explain_missing(self, place: HubPlace, message: str) -> CheckpointError:
        """Return the error for a file that is not listed: `Absent`, unless the cache alone was asked."""
        assert place.revision
        if found := self._snapshots.get((place.repo, place.revision)):
            return CheckpointError(f"{place}: {found[1]}, and its cache lacks it; when it can: {place.download}")
        return Absent(message)

    def _ask(self, place: HubPlace) -> str:
        with explained(place, self._api.endpoint):
            info = self._api.model_info(place.repo, revision=place.revision, files_metadata=True, timeout=ANSWER_S)
            commit, files = _read_info(info)
        self._files[place.repo, commit] = {
            each.rfilename: _make_pin(HubPlace(place.repo, commit, each.rfilename), each) for each in files
        }
        return commit

    def _look_up(self, place: HubPlace, why: str) -> str:
        revision = place.revision or constants.DEFAULT_REVISION
        folder = hub_cache.find_snapshot(place.repo, revision)
        if folder is None:
            raise CheckpointError(f"{place}: {why}, and its cache has no such model; when it can: {place.download}")
        commit = folder.name
        self._files[place.repo, commit] = hub_cache.list_snapshot(folder, str(HubPlace(place.repo, commit)))
        self._snapshots[place.repo, commit] = folder, why
        return commit


def _read_info(info: ModelInfo) -> tuple[str, list[RepoSibling]]:
    """Return commit and files of a model; ValueError where they are missing."""
    files = info.siblings or []
    if not info.sha or any(each.size is None or not (each.lfs or each.blob_id) for each in files):
        raise ValueError("no commit, or files without sizes or hashes")
    return info.sha, files


def _make_pin(place: HubPlace, file: RepoSibling) -> Pin:
    """Return the pin of a file: its size, and SHA-256 where the Hub knows it, else Git's hash."""
    assert file.size is not None
    return Pin(str(place), file.size, f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}")

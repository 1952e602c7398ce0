"""Small objects in any storage that fsspec can write: see `objects`.

Whether an object is written only where there is none is asked of the server in one request where its driver can say so.
Elsewhere it is looked for first: two writers at the same moment would not see each other.
"""

import functools
import inspect
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.errors import MergemillError, OutputError, StorageError
from mergemill.engine.storage import fetch
from mergemill.engine.storage.bounds import find_state_bound
from mergemill.engine.storage.copied import Copied
from mergemill.engine.storage.objects import check_state
from mergemill.engine.storage.store import Storage
from mergemill.engine.storage.streams import (
    UNFINISHED,
    explained,
    in_folder,
    is_folder_like,
    is_of_process,
    locate,
    open_stream,
)


class AnyObjects:
    """Objects by their URLs; in a store with folders they lie in `beside`, an URL, until they are whole."""

    def __init__(self, beside: str, storage: Storage) -> None:
        self._beside = beside
        self._storage = storage

    def put(
        self, url: str, data: bytes | Copied, *, absent: bool = False, error: type[MergemillError] = StorageError
    ) -> bool:
        """Write an object; with `absent` only where there is none, and return whether `data` is there now.

        What is larger is streamed, as shards are, after it was looked for: drivers create no stream only where there
        is none.
        """
        if isinstance(data, Copied) and is_of_process(url):
            data = b"".join(data.read_pieces())  # it lies in this memory anyhow
        if isinstance(data, Copied):
            return self._put_copied(url, data, absent=absent, error=error)
        if absent and (there := self.get(url, error=error)) is not None:
            return there == data
        if is_folder_like(url):
            return self._put_whole(url, data, error)
        system, path = locate(url, self._storage)
        with explained(url, error):
            try:
                system.pipe_file(path, data, **(_find_option(system) if absent else {}))
            except FileExistsError:
                return self.get(url, error=error) == data
        return True

    def get(self, url: str, *, error: type[MergemillError] = StorageError) -> bytes | None:
        """Return an object; None where there is none."""
        system, path = locate(url, self._storage)
        with explained(url, error, "read"):
            try:
                data = bytes(system.cat_file(path, end=find_state_bound(url) + 1))
            except FileNotFoundError:
                return None
        return check_state(data, url)

    def get_all(self, urls: Sequence[str]) -> list[bytes | None]:
        """Return objects, fetched at the same time."""
        return [coming.result() for coming in [fetch.submit(functools.partial(self.get, url)) for url in urls]]

    def get_age(self, url: str) -> float | None:
        """Return how many seconds ago an object was written, by the clock of the server; None where there is none.

        `OutputError` where the storage tells no times. No driver tells the time of its server: that of an object which
        is written now does.
        """
        now = f"{url}.{secrets.token_hex(4)}"
        self.put(now, b"now")
        (system, path), (_, new) = locate(url, self._storage), locate(now, self._storage)
        try:
            with explained(url, doing="looked at"):
                system.invalidate_cache()
                now_there = system.modified(new)
                try:
                    there = system.modified(path)
                except FileNotFoundError:
                    return None
                return float((now_there - there).total_seconds())
        except OutputError as error:
            raise OutputError(
                f"{url}: somebody may be writing here, or was killed; storage does not tell when this was written: "
                "remove it when nobody is"
            ) from error
        finally:
            self.delete([now])

    def delete(self, urls: Sequence[str]) -> None:
        """Remove objects, in their order; what is not there is no error."""
        for url in urls:
            system, path = locate(url, self._storage)
            with explained(url, doing="removed"):
                try:
                    system.rm_file(path)
                except FileNotFoundError:
                    continue

    def list_objects(self, url: str, *, error: type[MergemillError] = StorageError) -> Mapping[str, int]:
        """Return the sizes in bytes of all objects below a prefix, by their names after it."""
        system, folder = locate(url.rstrip("/"), self._storage)
        with explained(url, error, "listed"):
            system.invalidate_cache()
            try:
                found = system.find(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {name.removeprefix(f"{folder}/"): int(each["size"]) for name, each in sorted(found.items())}

    def _put_whole(self, url: str, data: bytes, error: type[MergemillError]) -> bool:
        """Write an object where one that is being written can be seen."""
        beside = self._name_unfinished()
        in_folder(beside, self._storage, lambda system, path: system.pipe_file(path, data), error)
        self._move(beside, url, error)
        return True

    def _put_copied(self, url: str, data: Copied, *, absent: bool, error: type[MergemillError]) -> bool:
        """Stream a file to where it belongs, or in a store with folders to where one that is being written can be seen.

        An object store shows a file when it is whole.
        """
        system, path = locate(url, self._storage)
        with explained(url, error, "read"):
            system.invalidate_cache()
            if absent and system.exists(path):
                return data.is_at(url, self._storage)
        beside = self._name_unfinished() if is_folder_like(url) else url
        with open_stream(beside, self._storage) as stream:
            for piece in data.read_pieces():
                stream.write(memoryview(piece))
            stream.finish()
        if beside != url:
            self._move(beside, url, error)
        return True

    def _name_unfinished(self) -> str:
        return f"{self._beside}/object{UNFINISHED}{secrets.token_hex(4)}"

    def _move(self, beside: str, url: str, error: type[MergemillError]) -> None:
        _, new = locate(beside, self._storage)
        in_folder(url, self._storage, lambda system, path: system.mv(new, path), error)


def _find_option(system: Any) -> Mapping[str, str]:
    """Return what asks the server not to replace an object, where the driver has that."""
    method = getattr(system, "_pipe_file", system.pipe_file)
    return {"mode": "create"} if "mode" in inspect.signature(method).parameters else {}

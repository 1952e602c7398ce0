"""Publishing a finished output: a folder or a prefix of object storage becomes a repository of the Hub.

What the merge wrote goes up as it lies there now, the card by the repository's name; ``.mergemill`` and what somebody
else put beside it stay. Weights go one by one to the Hub's storage, then one commit names all of it, so that who looks
finds all or nothing. Pushed again after an interruption, what the Hub has is not sent again: it knows contents by
their SHA-256, for which each file is read once more.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.card import name_card
from mergemill.engine.errors import CheckpointError, OutputError, RunError
from mergemill.engine.plan.small_files import CARD_NAME
from mergemill.engine.runs.outputs.hub import TITLE, check_room, parse_name
from mergemill.engine.runs.outputs.output import Output
from mergemill.engine.runs.outputs.record import Record
from mergemill.engine.storage.copied import JOINED_BYTES, Copied
from mergemill.engine.storage.hub_upload import Content, Head, HubRepo, find_endpoint
from mergemill.engine.storage.ranges import Pin, join, list_files, read_pieces, read_whole
from mergemill.engine.storage.store import Storage
from mergemill.engine.storage.tries import insist

_HUB = "hf://"
OnFile = Callable[[str, int, int], None]  # is told a name, its number from 1, and how many there are


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a repository holds now."""

    out: str
    repository: str  # its URL
    files: int
    bytes: int
    sent_bytes: int  # of weights; what the Hub had already is not sent


def publish(output: Output, repository: str, on_file: OnFile, *, public: bool) -> Pushed:
    """Publish a finished output; errors as of `push`."""
    repo = _find_repo(repository)
    record = _read_finished(output)
    head = repo.look()
    pins = {name: _find(output, name) for name in (*record.shards, *record.files)}
    for name, shard in record.shards.items():
        if pins[name].size_bytes != shard["size_bytes"]:
            raise OutputError(f"{join(str(output), name)}: has {pins[name].size_bytes} bytes, not those of the merge")
    names = [name for name in record.files if pins[name].size_bytes <= JOINED_BYTES]
    small = {name: _read_small(pins[name], repo, name, output.storage) for name in names}
    large = {name: Copied(pin, output.storage) for name, pin in pins.items() if name not in small}
    contents = [Content(name, each.size_bytes, _hash(each)) for name, each in large.items()]
    done = Pushed(str(output), str(repo), len(pins), sum(pin.size_bytes for pin in pins.values()), 0)
    if head is not None and _is_there(repo, head, output.storage, contents, small):
        return done
    if head is None:
        repo.create(private=not public)
    else:
        check_room(repo, head, public=public)
    missing = repo.find_missing(contents)
    for number, content in enumerate(missing, 1):
        on_file(content.name, number, len(missing))
        repo.upload(content, large[content.name].open, lambda: None)
    _commit(repo, output.storage, contents, small, public=public)
    return Pushed(done.out, done.repository, done.files, done.bytes, sum(each.size_bytes for each in missing))


def _find_repo(repository: str) -> HubRepo:
    name = parse_name(repository if repository.startswith(_HUB) else f"{_HUB}{repository}")
    return HubRepo(name, find_endpoint())


def _read_finished(output: Output) -> Record:
    if str(output).startswith(_HUB):
        raise OutputError(f"{output}: is on the Hub already; merge into a folder or s3://… to publish it later")
    record = output.read_record()
    if record is None:
        raise OutputError(f"{output}: holds no merge that mergemill wrote; there is no .mergemill/plan.json")
    if not output.journal.is_committed():
        raise OutputError(f"{output}: is unfinished; run the same merge again to finish it, then push it")
    return record


def _find(output: Output, name: str) -> Pin:
    pin = output.find(name)
    if pin is None:
        raise OutputError(f"{join(str(output), name)}: is gone; it was written with the merge")
    return pin


def _read_small(pin: Pin, repo: HubRepo, name: str, storage: Storage) -> bytes:
    data = read_whole(pin, storage=storage)
    return name_card(data.decode(errors="replace"), repo.name).encode() if name == CARD_NAME else data


def _hash(copied: Copied) -> str:
    found = hashlib.sha256()
    for piece in read_pieces(copied.pin, copied.size_bytes, copied.storage):
        found.update(piece)
    return found.hexdigest()


def _is_there(
    repo: HubRepo, head: Head, storage: Storage, contents: Sequence[Content], small: Mapping[str, bytes]
) -> bool:
    """Whether the main branch holds the same: by the hashes that the Hub knows, SHA-256 or Git's."""
    names = {*(content.name for content in contents), *small}
    if not names <= head.files:
        return False
    try:
        there = list_files(f"{_HUB}{repo.name}@{head.commit}", "", storage) or {}
    except CheckpointError:
        return False
    wanted = {content.name: (f"sha256:{content.sha256}",) for content in contents}
    return all(
        name in there and there[name].stamp in stamps
        for name, stamps in {**wanted, **{name: _list_stamps(data) for name, data in small.items()}}.items()
    )


def _list_stamps(data: bytes) -> tuple[str, ...]:
    """Return what the Hub may say of a small file: it has some suffixes in its large file storage."""
    git = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False)
    return f"git:{git.hexdigest()}", f"sha256:{hashlib.sha256(data).hexdigest()}"


def _commit(
    repo: HubRepo, storage: Storage, contents: Sequence[Content], small: Mapping[str, bytes], *, public: bool
) -> None:
    """Commit, unless an attempt whose answer was lost has done it."""

    def commit() -> bool:
        head = repo.look()
        if head is None:
            raise RunError(f"{repo}: is gone; push again")
        if _is_there(repo, head, storage, contents, small):
            return True
        check_room(repo, head, public=public)
        repo.commit(contents, small, head, TITLE)
        return False

    while not insist(commit, f"{repo}: the commit"):
        pass  # and look whether it is there

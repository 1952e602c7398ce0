"""An output on the Hub: each task merges a shard onto a disk, uploads it and removes it; one commit makes them a model.

Until then the repository holds nothing of the merge: what is uploaded has no name there, and the Hub drops it some day.
Record and receipts lie in a folder of this machine meanwhile, with the SHA-256 by which the Hub knows each shard. The
commit takes them along, so that the merge can be verified from anywhere. Another machine that takes an unfinished merge
over has no receipts: it merges again, and uploads what the Hub has not.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from mergemill.engine.checkpoint.card import name_card
from mergemill.engine.errors import CheckpointError, OutputError, RunError
from mergemill.engine.plan.sizes import format_size
from mergemill.engine.plan.small_files import CARD_NAME
from mergemill.engine.plan.values import Plan, SmallFile
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.published import Published, make_state
from mergemill.engine.runs.outputs.receipts import Receipt, keep_planned
from mergemill.engine.runs.outputs.record import Record, list_ranges, take_small
from mergemill.engine.runs.outputs.staged import BESIDE_BYTES, StagedTarget
from mergemill.engine.runs.outputs.state import RECORD_NAME
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage.cache import default_folder
from mergemill.engine.storage.copied import Copied
from mergemill.engine.storage.hub_place import parse_url
from mergemill.engine.storage.hub_upload import Content, Head, HubRepo, find_endpoint
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.storage.store import Storage
from mergemill.engine.storage.tries import insist

TITLE = "A merge of models, made with mergemill"
_EXPECTED = re.compile(r"\.gitattributes|README\.md|LICENSE(\.\w+)?")  # in a repository that holds no model


class HubOutput:
    """A repository of the Hub, and what is done with it: see `Output`."""

    beside_bytes = BESIDE_BYTES

    def __init__(self, url: str, storage: Storage, *, public: bool = False) -> None:
        self.storage = storage
        self._repo = HubRepo(parse_name(url), find_endpoint())
        self._public = public
        self._published = Published(str(self._repo), storage)
        self._local = FolderOutput(_find_folder(self._repo), str(self._repo), storage)
        self.journal = HubJournal(self._published, self._local)
        self.notes = self._local.notes

    def __str__(self) -> str:
        """Where it is, as the user wrote it."""
        return str(self._repo)

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Raise `OutputError` where they do not share this machine's disk, or that has no room for their shards."""
        if not workers.is_here:
            raise OutputError(
                f"{self}: shards lie on a disk of this machine until they are uploaded, which the workers of a cluster "
                "do not share; leave out --scheduler and --cluster, or merge into s3:// or a folder that they share"
            )
        count = min(workers.count * workers.threads, len(plan.shards))
        largest_bytes = max((shard.size_bytes for shard in plan.shards), default=0)
        folder = next(place for place in self._local.state.parents if place.exists())
        left_bytes = sum(path.stat().st_blocks * 512 for path in self._list_unfinished())
        free_bytes = shutil.disk_usage(folder).free + left_bytes
        if free_bytes < count * largest_bytes:
            raise OutputError(
                f"{folder}: disk too full: {count} shards of {format_size(largest_bytes)} lie here at once until they "
                f"are uploaded, {format_size(free_bytes)} are free; use fewer --workers and --threads, a smaller "
                "--shard-size, or another disk: XDG_CACHE_HOME"
            )

    def read_record(self) -> Record | None:
        """Return what is committed to the repository, or else is on its way there from this machine."""
        return self._published.read_record() or self._local.read_record()

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where the repository cannot be seen with the token used here, or holds anything else."""
        if head := self._repo.look():
            self._check_room(head)

    def check_room(self, plan: Plan) -> None:
        """The Hub's is not known; that of this machine's disk is asked with the workers."""

    def open(self, plan: Plan) -> None:
        """Make the folder for what this machine notes of the merge, after the same check."""
        self.check(plan)
        self._local.make_state()

    def locked(self) -> AbstractContextManager[None]:
        """Hold the output for this process; `OutputError` while another one of this machine does."""
        return self._local.locked()

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Make the repository if there is none; returns the receipts of shards that the Hub still has."""
        if self._repo.look() is None:
            self._repo.create(private=not self._public)
        self._local.write_record(plan)
        for path in self._list_unfinished():
            path.unlink()
        receipts = keep_planned(self._local.journal.read(), list_ranges(plan))
        contents = _find_uploaded(plan, receipts)
        missing = self._repo.find_missing(list(contents.values()))
        there = contents.keys() - {content.name for content in missing}
        return {part.number: receipts[part.number] for part in plan.parts if plan.shards[part.shard].name in there}

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each shard of the started plan is written, once for each of its parts."""
        folder = self._local.state.absolute()
        targets = [
            StagedTarget(self._repo, folder, shard.name, shard.header, shard.size_bytes) for shard in plan.shards
        ]
        return [targets[part.shard] for part in plan.parts]

    def files_seen(self) -> Mapping[str, int]:
        """All workers are on this machine."""
        return {}

    def commit(self, plan: Plan) -> None:
        """Commit the uploaded shards and all small files at once; the card by the repository's name."""
        self._local.check_recorded(plan)
        plan = replace(plan, files=tuple(_name(file, self._repo.name) for file in plan.files))
        receipts = keep_planned(self._local.journal.read(), list_ranges(plan))
        contents = _find_uploaded(plan, receipts)
        missing = [content.name for content in self._repo.find_missing(list(contents.values()))]
        missing += [plan.shards[part.shard].name for part in plan.parts if plan.shards[part.shard].name not in contents]
        if missing:
            raise RunError(f"{self}: the Hub has lost {missing[0]}; run the same merge again to resume")
        empty = {shard.name: shard.header for shard in plan.shards if shard.name not in contents}
        small = {file.name: take_small(file, self.storage) for file in plan.files}
        files = {name: data for name, data in small.items() if isinstance(data, bytes)}
        copied = [self._upload_copied(name, data) for name, data in small.items() if isinstance(data, Copied)]
        state = make_state(plan, [receipts[part.number] for part in plan.parts], self.storage)
        self._commit(plan, [*contents.values(), *copied], {**empty, **files, **state})

    def _upload_copied(self, name: str, copied: Copied) -> Content:
        """Upload a file that is too large to go with the commit, as shards are; one that is there already is not sent.

        It is read twice: its SHA-256 is asked for first.
        """
        found = hashlib.sha256()
        for piece in copied.read_pieces():
            found.update(piece)
        content = Content(name, copied.size_bytes, found.hexdigest())
        self._repo.upload(content, copied.open, lambda: None)
        return content

    def mark_committed(self) -> None:
        """Remove what this machine noted of the merge; what is left of it counts no more."""
        self._local.discard()

    def find(self, name: str) -> Pin | None:
        """Return the pin of a file of the finished output."""
        return self._published.find(name)

    def list_replaced(self, plan: Plan) -> Sequence[str]:
        """Refuse: a repository has a history, and others may have it already."""
        raise OutputError(f"{self}: is published; --overwrite is for folders and object storage: choose another name")

    def clear(self, plan: Plan) -> None:
        """Refuse, see above."""
        self.list_replaced(plan)

    def abort(self, *, replaced: bool = False) -> int:
        """Remove what an unfinished merge left on this machine; returns the bytes freed. The repository stays."""
        if not self._local.has_record():
            raise OutputError(
                f"{self}: no merge that goes there is unfinished on this machine; there is nothing to abort"
            )
        return self._local.abort()

    def _list_unfinished(self) -> list[Path]:
        return list(self._local.state.glob(f"*{StagedTarget.mark}*"))

    def _check_room(self, head: Head) -> None:
        """Raise `OutputError` for what the merge must not be added to; whose merge is there is asked elsewhere."""
        if RECORD_NAME not in head.files:
            check_room(self._repo, head, public=self._public)

    def _commit(self, plan: Plan, contents: Sequence[Content], files: Mapping[str, bytes]) -> None:
        """Commit, unless that is done: by an attempt whose answer was lost, or by another machine."""

        def commit() -> bool:
            head = self._repo.look()
            if head is None:
                raise RunError(f"{self}: is gone; run the same merge again")
            self._check_room(head)
            if published := self._published.read_record():
                if published.digest != plan.digest:
                    raise OutputError(f"{self}: holds another merge by now; choose another name")
                return True
            self._repo.commit(contents, files, head, TITLE)
            return False

        while not insist(commit, f"{self}: the commit"):
            pass  # and look whether it is there


class HubJournal:
    """The receipts of a merge: committed ones, or else those of this machine."""

    def __init__(self, published: Published, local: FolderOutput) -> None:
        self._published = published
        self._local = local
        self.append = local.journal.append

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""
        yield from self._published.read_receipts() or self._local.journal.read()

    def follow(self) -> Iterator[Receipt]:
        """Yield the receipts that this machine has written since this was last asked."""
        yield from self._local.journal.follow()

    def is_committed(self) -> bool:
        """Whether the merge was finished."""
        return self._published.read_record() is not None


def check_room(repo: HubRepo, head: Head, *, public: bool) -> None:
    """Raise `OutputError` for a repository that holds more than a new one does, or is seen by others than asked."""
    if foreign := sorted(name for name in head.files if not _EXPECTED.fullmatch(name)):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise OutputError(f"{repo}: holds {foreign[0]!r}{more}; the output must be a repository without a model")
    if public == head.private:
        found, flag = ("private", "leave out --public") if head.private else ("public", "say so with --public")
        raise OutputError(f"{repo}: is there already and {found}; if it is to be, {flag}, or choose another name")


def _name(file: SmallFile, repo: str) -> SmallFile:
    if file.name != CARD_NAME or file.data is None:
        return file
    return replace(file, data=name_card(file.data.decode(), repo).encode())


def parse_name(url: str) -> str:
    """Return the repository's name; `OutputError` for what is no whole repository."""
    try:
        place = parse_url(url)
    except CheckpointError as error:
        raise OutputError(str(error)) from error
    if place.revision is not None or place.path:
        raise OutputError(f"{url}: a merge is written to the main branch of a repository: hf://{place.repo}")
    return place.repo


def _find_folder(repo: HubRepo) -> Path:
    """Return where this machine keeps what it knows of an unfinished merge."""
    place = f"{repo.endpoint.split('://', 1)[-1]}/{repo.name}"
    return default_folder() / "uploads" / re.sub(r"[^\w.-]", "--", place)


def _find_uploaded(plan: Plan, receipts: Mapping[int, Receipt]) -> dict[str, Content]:
    """Return by name the shards all of whose parts have receipts of one upload."""
    contents: dict[str, Content] = {}
    for number, parts in groupby(plan.parts, lambda part: part.shard):
        shard = plan.shards[number]
        found = [receipts.get(part.number) for part in parts]
        hashes = {str(receipt.uploads[0][1]) if receipt and receipt.uploads else "" for receipt in found}
        if len(hashes) == 1 and "" not in hashes:
            contents[shard.name] = Content(shard.name, shard.size_bytes, hashes.pop())
    return contents

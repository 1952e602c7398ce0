"""Where a merge goes, whatever kind of storage that is: from its first byte to the commit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from mergemill.engine.errors import OutputError
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.notes import Notes
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.outputs.record import Record, check_names, make_record
from mergemill.engine.runs.outputs.replaced import check_sources
from mergemill.engine.runs.outputs.target import Target
from mergemill.engine.runs.worker.workers import Workers
from mergemill.engine.storage.ranges import Pin, is_remote
from mergemill.engine.storage.store import ENVIRONMENT, Storage
from mergemill.engine.storage.urls import parse_place

_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hub"}  # scheme -> what installs the client of that storage


class Receipts(Protocol):
    """The receipts of finished parts, kept with the output."""

    def read(self) -> Iterator[Receipt]:
        """Yield the receipts in the order in which they were written."""

    def follow(self) -> Iterator[Receipt]:
        """Yield the receipts that were written since this was last asked, whoever wrote them."""

    def is_committed(self) -> bool:
        """Whether the merge was finished."""

    def append(self, receipt: Receipt) -> None:
        """Add a receipt."""


class Output(Protocol):
    """An output and its hidden state; its text is where it is, as the user wrote it."""

    @property
    def storage(self) -> Storage:
        """How it is reached, and the small files that are copied to it."""

    @property
    def journal(self) -> Receipts:
        """The receipts of its parts."""

    @property
    def notes(self) -> Notes:
        """Who drives the merge, and requests to that."""

    @property
    def beside_bytes(self) -> int:
        """The memory that writing a part takes, beside what merging it does."""

    def check_workers(self, workers: Workers, plan: Plan) -> None:
        """Raise `OutputError` where such workers cannot write the shards of `plan` to it."""

    def read_record(self) -> Record | None:
        """Return what it is the output of; None where nothing has begun."""

    def check(self, plan: Plan) -> None:
        """Raise `OutputError` where it holds anything else; nothing is written."""

    def check_room(self, plan: Plan) -> None:
        """Raise `StorageError` where it is known to have no room for what is still to be written."""

    def open(self, plan: Plan) -> None:
        """Make it the output of `plan`, new or resumed, after the same check."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold the output for this process; `OutputError` while another one does."""

    def start(self, plan: Plan) -> Mapping[int, Receipt]:
        """Create what is missing of the plan's record and shards; returns the receipts that can still be trusted."""

    def targets(self, plan: Plan) -> Sequence[Target]:
        """Return where each part of the started plan is written."""

    def files_seen(self) -> Mapping[str, int]:
        """Return files that every worker must see, sizes in bytes by path."""

    def commit(self, plan: Plan) -> None:
        """Turn finished parts into a checkpoint; the index is written last.

        Then its plan tells nothing of this machine any more.
        """

    def mark_committed(self) -> None:
        """Note that the committed output is whole; nothing beside it tells of this machine any more."""

    def find(self, name: str) -> Pin | None:
        """Return the pin of a file of the finished output."""

    def list_replaced(self, plan: Plan) -> Sequence[str]:
        """Return the files of a finished merge that gives way to `plan`, its seal first.

        `OutputError` where anything else lies there, or something was changed since.
        """

    def clear(self, plan: Plan) -> None:
        """Remove a finished merge that gives way to `plan`, held by this process; its record goes last."""

    def abort(self, *, replaced: bool = False) -> int:
        """Remove what an unfinished merge left; returns the bytes freed. Nothing else is touched.

        replaced: it is what was not removed yet of a finished merge that was to be replaced.
        """


def find_output(out: str | Path, storage: Storage = ENVIRONMENT, *, public: bool = False) -> Output:
    """Return the output at a path or URL; nothing is looked at yet. `OutputError` where nothing can be written.

    storage: how it is reached, and so are the small files that are copied to it. public: whether a repository of the
    Hub is to be seen by everybody.
    """
    place = parse_place(out, OutputError)
    if public and not place.startswith("hf://"):
        raise OutputError(f"{place}: --public is for repositories of the Hub: hf://org/name")
    if not is_remote(place):
        return FolderOutput(Path(place), storage=storage)
    scheme = place.split("://", 1)[0]
    try:
        return _find_remote(scheme, place, storage, public=public)
    except ImportError as error:
        needed = f"mergemill[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else f"what {scheme}:// needs"
        raise OutputError(f"{place}: {error.name or error} is not installed; install {needed}") from error


def _find_remote(scheme: str, place: str, storage: Storage, *, public: bool) -> Output:
    if _EXTRAS.get(scheme) == "s3":
        from mergemill.engine.runs.outputs.bucket import BucketOutput

        return BucketOutput(place, storage)
    if scheme == "hf":
        from mergemill.engine.runs.outputs.hub import HubOutput

        return HubOutput(place, storage, public=public)
    from mergemill.engine.runs.outputs.whole import WholeOutput

    return WholeOutput(place, storage)


def open_output(
    out: str | Path, plan: Plan, storage: Storage = ENVIRONMENT, *, public: bool = False, overwrite: bool = False
) -> Output:
    """Make `out` the output of `plan`, new or resumed; `OutputError` where it holds anything else.

    overwrite: a finished merge may be there, which is left alone yet.
    """
    check_names([shard.name for shard in plan.shards] + [file.name for file in plan.files], str(out))
    output = find_output(out, storage, public=public)
    output.open(plan)
    check_held(output, plan, [plan], overwrite=overwrite)
    return output


def check_held(output: Output, plan: Plan, readers: Sequence[Plan], *, overwrite: bool) -> None:
    """Raise `OutputError` where the output holds what `plan` neither goes on with nor may replace.

    readers: the merges whose sources would be gone if it were replaced.
    """
    if not (overwrite and is_replaced(output, plan)):
        check_same(output, plan)
        return
    for reader in readers:
        check_sources(reader, str(output))
    output.list_replaced(plan)


def is_replaced(output: Output, plan: Plan) -> bool:
    """Whether what is there is a finished merge other than that of `plan`, or one of which something is gone."""
    held = output.read_record()
    if held is None or not (held.finished or output.journal.is_committed()):
        return False
    if held.digest != make_record(plan, output.storage).digest:
        return True
    return any(output.find(name) is None for name in (*held.shards, *held.files))


def check_same(output: Output, plan: Plan) -> None:
    """Raise `OutputError` where the output belongs to another merge."""
    held = output.read_record()
    if held is None:
        return
    wanted = make_record(plan, output.storage)
    if held.digest != wanted.digest:
        ways = f"choose another folder, or remove the unfinished one with: mergemill abort {output}"
        if output.journal.is_committed():
            ways = "that one is finished; choose another folder, or replace it with --overwrite"
        elif held.finished:
            ways = (
                "of that one, which was being replaced, a part is left; replace that with --overwrite, or remove it "
                f"with: mergemill abort {output}"
            )
        raise OutputError(f"{output}: holds another merge, which differs in {held.describe_difference(wanted)}; {ways}")


def start_output(output: Output, plan: Plan) -> Mapping[int, Receipt]:
    """Create what is missing of the plan's record and shards; returns the receipts that can still be trusted."""
    return output.start(plan)


def commit_output(output: Output, plan: Plan) -> None:
    """Turn finished parts into a checkpoint; the index is written last."""
    output.commit(plan)

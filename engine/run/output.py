"""The output folder from its first byte to the commit, and what is left of it when a merge is given up.

All unfinished work lies in the hidden folder ``.mergemill``: ``plan.json`` (what is being merged), ``journal.jsonl``
(receipts), the shards as ``<name>.tmp-<digest>``. At commit the shards are renamed into the output, the small files
written, the index last: only then does a loader find a model.
"""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mergemill.engine.errors import OutputError, StorageError
from mergemill.engine.plan.values import Plan, Shard
from mergemill.engine.run.receipts import Journal, Receipt
from mergemill.engine.run.record import Record, checksum, make_record, read_record, read_small
from mergemill.engine.storage.positioned import (
    check_space,
    create_positioned,
    make_folder,
    open_positioned,
    rename_file,
    sync_folder,
    write_file,
)

STATE_NAME = ".mergemill"


class Output:
    """The places in an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / STATE_NAME
        self.record_path = self.state / "plan.json"
        self.journal = Journal(self.state / "journal.jsonl")

    def unfinished(self, shard_name: str, digest: str) -> Path:
        """Where a shard lies until the commit."""
        return self.state / f"{shard_name}.tmp-{digest[:12]}"

    def finished(self, shard_name: str) -> Path:
        """Where a shard lies after the commit."""
        return self.folder / shard_name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output for this process; `OutputError` while another one does."""
        with open(self.state / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"{self.folder}: another mergemill is writing here; wait for it or stop it") from error
            yield


def open_output(folder: Path, plan: Plan) -> Output:
    """Make `folder` the output of `plan`, new or resumed; `OutputError` where it holds anything else."""
    output = Output(folder)
    if not output.record_path.exists():
        _check_free(folder)
    make_folder(output.state)
    if output.record_path.exists():
        _check_same(folder, read_record(output.record_path), make_record(plan))
    return output


def start_output(output: Output, plan: Plan) -> Mapping[int, Receipt]:
    """Create what is missing of the plan's record and shards; returns the receipts that can still be trusted."""
    if not output.record_path.exists():
        write_file(output.record_path, make_record(plan).to_json())
    missing = [shard for shard in plan.shards if not _is_there(output, shard, plan.digest)]
    check_space(output.state, sum(shard.size_bytes for shard in missing))
    for shard in missing:
        create_positioned(output.unfinished(shard.name, plan.digest), shard.size_bytes, shard.header)
    lost = {shard.name for shard in missing}
    numbers = {(part.start_bytes, plan.shards[part.shard].name): part for part in plan.parts}
    return {
        receipt.part: receipt
        for receipt in output.journal.read()
        if receipt.shard not in lost and (receipt.start_bytes, receipt.shard) in numbers
    }


def find_shard(output: Output, shard_name: str, digest: str) -> Path:
    """Return where the shard lies now: renamed already by an interrupted commit, or still unfinished."""
    finished = output.finished(shard_name)
    return finished if finished.exists() else output.unfinished(shard_name, digest)


def commit_output(output: Output, plan: Plan) -> None:
    """Turn finished parts into a checkpoint: sync and rename the shards, write the files, the index last."""
    for shard in plan.shards:
        unfinished = output.unfinished(shard.name, plan.digest)
        if unfinished.exists():
            with open_positioned(unfinished) as writer:
                writer.sync()
            rename_file(unfinished, output.finished(shard.name))
    sync_folder(output.folder)
    for file in plan.files:
        _write_small(output.folder / file.name, read_small(file))
    output.journal.append_commit()


def abort_output(out: str | Path) -> int:
    """Remove what an unfinished merge left in the folder `out`; returns the bytes freed. Nothing else is touched."""
    folder = Path(out)
    output = Output(folder)
    if not output.state.is_dir():
        raise OutputError(f"{folder}: holds no unfinished merge; there is nothing to abort")
    if output.journal.is_committed():
        raise OutputError(f"{folder}: is a finished merge; remove the folder yourself if you do not want it")
    with output.locked():
        record = read_record(output.record_path) if output.record_path.exists() else None
        left = _list_left(output, record)
        freed_bytes = sum(path.stat().st_blocks * 512 for path in left)
        for path in left:
            path.unlink()
        for place in (output.state, folder):
            _remove_empty(place)
    return freed_bytes


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; the output must be a folder, new or empty")
    found = sorted(path.name for path in folder.iterdir() if path.name != STATE_NAME) if folder.exists() else []
    if found:
        raise OutputError(f"{folder}: holds {found[0]!r}{_more(found)}; the output must be a folder, new or empty")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_same(folder: Path, held: Record, wanted: Record) -> None:
    if held.digest == wanted.digest:
        return
    raise OutputError(
        f"{folder}: holds another merge, which differs in {held.describe_difference(wanted)}; "
        f"choose another folder, or remove the unfinished one with: mergemill abort {folder}"
    )


def _is_there(output: Output, shard: Shard, digest: str) -> bool:
    path = find_shard(output, shard.name, digest)
    return path.exists() and path.stat().st_size == shard.size_bytes


def _write_small(path: Path, data: bytes) -> None:
    """Write a small file; one that somebody else put there in the meantime is not overwritten."""
    if path.exists():
        if path.read_bytes() == data:
            return
        raise OutputError(f"{path}: appeared while the merge ran; move it away and run the merge again to finish")
    write_file(path, data)


def _list_left(output: Output, record: Record | None) -> list[Path]:
    left = [path for path in sorted(output.state.iterdir()) if path.is_file()]
    if record is not None:
        # An interrupted commit has renamed some of these; the index, which is written last, is not there yet.
        left += [path for name in record.shards if (path := output.folder / name).is_file()]
        left += [path for name, sum_ in record.files.items() if _holds(path := output.folder / name, sum_)]
    return left


def _holds(path: Path, expected: str) -> bool:
    return path.is_file() and checksum(path.read_bytes()) == expected


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if not folder.exists() or any(folder.iterdir()):
            return
        raise StorageError(f"{folder}: removing it failed: {error.strerror}") from error



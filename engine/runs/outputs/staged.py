"""Shards that lie on a disk of this machine for as long as it takes to upload them."""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mergemill.engine.plan.values import Part
from mergemill.engine.runs.outputs.receipts import Receipt, Upload
from mergemill.engine.runs.outputs.state import flatten_name
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.hub_upload import Content, HubRepo
from mergemill.engine.storage.positioned import PositionedWriter, create_positioned, open_positioned

BESIDE_BYTES = 4 << 20  # that sending a file takes


@dataclass(frozen=True, slots=True)
class StagedTarget:
    """A shard of an output on the Hub."""

    repo: HubRepo
    folder: Path  # where it lies until it is uploaded
    shard: str
    header: bytes
    size_bytes: int
    beside_bytes = BESIDE_BYTES
    mark: ClassVar[str] = ".tmp-"  # in the names of such files

    @contextmanager
    def open_shard(self) -> Iterator["StagedWriter"]:
        """Create the file; it is removed at the end, as are those of attempts whose worker was killed."""
        name = f"{flatten_name(self.shard)}{self.mark}"
        for left in self.folder.glob(f"{name}*"):
            left.unlink(missing_ok=True)
        path = self.folder / f"{name}{secrets.token_hex(4)}"
        create_positioned(path, self.size_bytes, self.header)
        try:
            with open_positioned(path) as writer:
                yield StagedWriter(self, path, writer)
        finally:
            path.unlink(missing_ok=True)

    def check(self, part: Part, receipt: Receipt, workplace: Workplace) -> bool:
        """The Hub has the shard, or the receipt would not be trusted."""
        return True


class StagedWriter:
    """Writes a shard to the disk, then uploads it."""

    def __init__(self, target: StagedTarget, path: Path, writer: PositionedWriter) -> None:
        self._target = target
        self._path = path
        self._writer = writer
        self._hash = hashlib.sha256(target.header)
        self._done_bytes = len(target.header)

    def write(self, data: memoryview) -> None:
        """Add what follows."""
        self._writer.write(self._done_bytes, data)
        self._hash.update(data)
        self._done_bytes += len(data)

    def finish(self) -> None:
        """All of it is in the file."""

    def deliver(self, check_going: Callable[[], None]) -> Sequence[Upload]:
        """Upload it; returns its SHA-256."""
        sha256 = self._hash.hexdigest()
        content = Content(self._target.shard, self._target.size_bytes, sha256)
        self._target.repo.upload(content, lambda: self._path.open("rb", buffering=0), check_going)
        return ((1, sha256),)

"""Verifying a finished merge: shards against receipts, headers and files against the plan, parts merged anew."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergemill.engine.errors import CheckpointError, OutputError, VerifyError
from mergemill.engine.methods.own import MethodsFile
from mergemill.engine.plan.planners import OF_RECIPES, open_recipe, replan
from mergemill.engine.plan.sizes import say_count
from mergemill.engine.plan.small_files import GATES_NAME, RECIPE_NAME
from mergemill.engine.plan.values import Origin, Part, Plan
from mergemill.engine.recipe.stages import list_methods
from mergemill.engine.runs.opinion import check_by_library
from mergemill.engine.runs.outputs.checksum import checksum_copied, checksum_range
from mergemill.engine.runs.outputs.output import Output, find_output
from mergemill.engine.runs.outputs.receipts import Receipt, keep_planned
from mergemill.engine.runs.outputs.record import Record, checksum, read_header_text
from mergemill.engine.runs.tasks.piece import find_factors, gather_rest, gather_squares, with_factors
from mergemill.engine.runs.tasks.rounds import iter_cut_tensors
from mergemill.engine.runs.tasks.task import merge_part
from mergemill.engine.runs.worker.workplace import Workplace
from mergemill.engine.storage.ranges import Pin, join, read_into, read_pieces, read_whole
from mergemill.engine.storage.store import Options, Storage, join_options, make_storage
from mergemill.engine.tensors.kernels import Partial, add_partials

MEMORY_BYTES = 1 << 30  # for verifying


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be right."""

    out: str
    digest: str  # of the plan
    shards: int
    parts: int
    files: int  # small files
    bytes: int  # checksummed
    replayed: int  # parts merged again from the sources


def verify(
    out: str | Path, *, replay: int = 0, run_code: Collection[str] = (), storage_options: Options | None = None
) -> Verified:
    """Check the finished merge in `out`; with `replay`, also merge that many parts again and compare.

    Raises `VerifyError` for the first thing that is not as it was written, and `OutputError` where `out` holds no
    merge. Replaying needs the sources as they were. A merge with methods of somebody's own keeps the text of their
    files, which alone is run, and only where `run_code` holds its sha256. `storage_options` are those of `abort`.
    """
    storage = make_storage(storage_options)
    output = find_output(out, storage)
    record = _open_record(output)
    origin = _open_origin(output, record, run_code) if replay else None
    receipts = {(receipt.shard, receipt.start_bytes): receipt for receipt in output.journal.read()}
    workplace = _open_workplace(storage)
    shards = {name: _check_shard(output, record, name) for name in record.shards}
    for shard, start_bytes, stop_bytes in record.parts:
        _check_part(shards[shard], receipts.get((shard, start_bytes)), stop_bytes, workplace)
    for name, expected in record.files.items():
        _check_file(output, name, expected)
    replayed = _replay(output, record, origin, receipts, replay, storage_options) if origin else 0
    return Verified(
        out=str(out),
        digest=record.digest,
        shards=len(record.shards),
        parts=len(record.parts),
        files=len(record.files),
        bytes=sum(stop - start for _, start, stop in record.parts),
        replayed=replayed,
    )


def list_code(out: str | Path, *, storage_options: Options | None = None) -> tuple[tuple[str, str], ...]:
    """Return name and sha256 of each file of methods that replaying the merge in `out` runs."""
    record = find_output(out, make_storage(storage_options)).read_record()
    return tuple((file.name, file.sha256) for file in _list_code(record)) if record else ()


def _open_workplace(storage: Storage) -> Workplace:
    return Workplace(MEMORY_BYTES, 1, storage=storage)


def _list_code(record: Record) -> list[MethodsFile]:
    return [MethodsFile(name, name, text) for name, text in record.code.items()]


def _open_origin(output: Output, record: Record, run_code: Collection[str]) -> Origin:
    """Return what the output was made from, as it says itself; `VerifyError` unless its code is kept, and may run."""
    text = _read_recipe(output, record) if RECIPE_NAME in record.files else record.recipe_text
    origin = Origin(record.kind, record.title, record.recipe, text, record.recipe_name, record.seed)
    return replace(origin, code=tuple(_open_code(output, record, origin, run_code)))


def _read_recipe(output: Output, record: Record) -> str:
    where, pin = join(str(output), RECIPE_NAME), output.find(RECIPE_NAME)
    text = b"" if pin is None else read_whole(pin, storage=output.storage)
    if checksum([text]) != record.files[RECIPE_NAME]:
        raise VerifyError(f"{where}: {'is gone' if pin is None else 'changed since it was written'}; merge again")
    return text.decode()


def _open_code(output: Output, record: Record, origin: Origin, run_code: Collection[str]) -> Sequence[MethodsFile]:
    """Return the files of methods that the output keeps; `VerifyError` unless they are all it needs, and may run."""
    kept = _list_code(record)
    for name in list_methods(open_recipe(origin)) if origin.kind in OF_RECIPES else ():
        if name not in record.code:
            raise VerifyError(f"{output}: its plan keeps no text of {name!r}, which its recipe runs; merge it again")
    for file in kept:
        where, beside = join(str(output), file.name), output.find(file.name)
        if beside is None or read_whole(beside, storage=output.storage) != file.text.encode():
            raise VerifyError(f"{where}: is not the code that the plan keeps of it")
        if file.sha256 not in run_code:
            raise VerifyError(
                f"{where}: merging again runs its code; read it, and if it may run say so: run_code=[{file.sha256!r}]"
            )
    return kept


def _open_record(output: Output) -> Record:
    record = output.read_record()
    if record is None:
        raise OutputError(f"{output}: holds no merge that mergemill wrote; there is no .mergemill/plan.json")
    if not output.journal.is_committed():
        done, parts = len(keep_planned(output.journal.read(), record.parts)), say_count(len(record.parts), "part")
        raise VerifyError(f"{output}: is unfinished: {done:,} of {parts}; run the same merge again to resume")
    return record


def _check_shard(output: Output, record: Record, name: str) -> Pin:
    expected, pin = record.shards[name], output.find(name)
    where = join(str(output), name)
    if pin is None:
        raise VerifyError(f"{where}: is gone; remove the folder and merge again")
    if pin.size_bytes != expected["size_bytes"]:
        raise VerifyError(f"{where}: has {pin.size_bytes} bytes; {expected['size_bytes']} were written")
    header = read_header_text(expected["header"])
    found = bytearray(len(header))
    read_into(pin, 0, memoryview(found), output.storage)
    if found != header:
        raise VerifyError(f"{where}: its header is not the one that was planned")
    if name.endswith(".safetensors"):
        check_by_library(pin, bytes(found), output.storage)
    return pin


def _check_part(pin: Pin, receipt: Receipt | None, stop_bytes: int, workplace: Workplace) -> None:
    if receipt is None or receipt.stop_bytes != stop_bytes:
        raise VerifyError(f"{pin.url}: the journal lacks the receipt of a part that ends at byte {stop_bytes}")
    found = checksum_range(pin, receipt.start_bytes, receipt.stop_bytes, workplace)
    expected = _find_checksum(receipt, workplace)
    if found != expected:
        raise VerifyError(
            f"{pin.url}: bytes {receipt.start_bytes} to {receipt.stop_bytes} changed since they were written: "
            f"checksum {found}, {'receipt' if receipt.checksum else 'source'} {expected}"
        )


def _find_checksum(receipt: Receipt, workplace: Workplace) -> str:
    """Return what a part's checksum must be; of one that the server copied, that of its source."""
    return receipt.checksum or checksum_copied(receipt.copied, workplace)


def _check_file(output: Output, name: str, expected: str) -> None:
    where, pin = join(str(output), name), output.find(name)
    if pin is None:
        raise VerifyError(f"{where}: is gone; it was written with the merge")
    if checksum(read_pieces(pin, storage=output.storage)) != expected:
        raise VerifyError(f"{where}: changed since it was written")


def _replay(
    output: Output,
    record: Record,
    origin: Origin,
    receipts: Mapping[tuple[str, int], Receipt],
    count: int,
    storage: Options | None,
) -> int:
    size = int(record.shard_size) if record.shard_size.isdecimal() else record.shard_size
    try:
        plan = replan(origin, size, storage)
    except CheckpointError as error:
        raise VerifyError(
            f"{output}: cannot be merged again from here: {error}; paths in its recipe go from where it was merged, so "
            "verify there, with the models as they were"
        ) from error
    workplace = _open_workplace(make_storage(join_options(storage or {}, plan.storage)))
    if plan.digest != record.digest:
        raise VerifyError(
            f"{record.recipe_name or 'recipe'}: gives another plan now; the sources or the version changed"
        )
    chosen = _spread(plan, count)
    factors = _find_factors(plan, workplace)
    totals = {
        name: gather_rest([with_factors(piece, factors) for piece in pieces], (), workplace)
        for name, pieces in iter_cut_tensors(plan, chosen)
    }
    for part in chosen:
        part = replace(part, pieces=tuple(with_factors(piece, factors) for piece in part.pieces))
        if plan.gates is not None:
            part = _put_gates(part, output)
        shard = plan.shards[part.shard].name
        found = merge_part(part, shard, _discard, totals, workplace).checksum
        if found != _find_checksum(receipts[shard, part.start_bytes], workplace):
            raise VerifyError(f"{shard}: merging bytes {part.start_bytes} to {part.stop_bytes} again gives other bytes")
    return len(chosen)


def _put_gates(part: Part, output: Output) -> Part:
    """Return a part with the gates that the output keeps: a forward pass is not the same bytes on every machine."""
    from mergemill.engine.runs.tasks.gates import put_gates, read_gates  # of mixtures alone

    where, pin = join(str(output), GATES_NAME), output.find(GATES_NAME)
    if pin is None:
        raise VerifyError(f"{where}: is gone; the routers were made of it")
    return put_gates(part, read_gates(read_whole(pin, storage=output.storage), where)[0])


def _spread(plan: Plan, count: int) -> tuple[Part, ...]:
    """Choose `count` parts evenly over the plan."""
    total = len(plan.parts)
    count = min(count, total)
    return tuple(plan.parts[i * total // count] for i in range(count))


def _find_factors(plan: Plan, workplace: Workplace) -> Sequence[float] | None:
    """Read all inputs once, where the factors on task vectors follow from their norms."""
    if plan.scaling is None:
        return None
    squares: Partial = ()
    for part in plan.parts:
        squares = add_partials(squares, gather_squares(part, len(plan.scaling.vectors), workplace))
    return find_factors(plan.scaling, squares)


def _discard(offset_bytes: int, data: memoryview) -> None:
    """Take bytes of a replayed part, of which only the checksum is wanted."""

"""``mergemill diff``: how two models differ, tensor by tensor; a table, JSON, or a page with pictures."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.options import (
    Cache,
    CacheFolder,
    Cluster,
    Json,
    Memory,
    Reader,
    Scheduler,
    StorageOf,
    Threads,
    Wait,
    Workers,
)
from mergemill.cli.pages import check_page, write_page

if TYPE_CHECKING:
    from mergemill.engine import reports, values

MOST_CHANGED = 10  # tensors that are listed

First = Annotated[str, typer.Argument(metavar="A", help="A model as in a recipe: a folder, s3://…, org/name.")]
Second = Annotated[str, typer.Argument(metavar="B", help="Another.")]
Base = Annotated[str | None, typer.Option(metavar="C", help="Compare what each of both changed of this model.")]
Page = Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with pictures there, such as diff.html.")]
EachTensor = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


def diff(
    first: First,
    second: Second,
    base: Base = None,
    html: Page = None,
    tensors: EachTensor = False,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    wait: Wait = 0.0,
    cluster: Cluster = None,
    storage_as: StorageOf = None,
    cache: Cache = None,
    cache_folder: CacheFolder = None,
    reader: Reader = None,
    json: Json = False,
) -> None:
    """Show how two models differ, and whether they can be merged.

    Example: mergemill diff models/chat models/code --base models/base --html diff.html
    """
    from mergemill.engine import diff as compare

    crew = make_crew(
        workers=workers,
        threads=threads,
        memory=memory,
        scheduler=scheduler,
        wait=wait,
        cluster=cluster,
        storage_as=storage_as,
        cache=cache,
        cache_folder=cache_folder,
        reader=reader,
    )
    if html:
        check_page(html)
    with ExitStack() as stack:
        found = compare(first, second, base, on_part=make_watch(stack), **crew)
    if html:
        write_page(found, html)
    if json:
        console.say_json(as_json(found, tensors=tensors))
        return
    show(found, tensors=tensors)
    if html:
        console.say(f"pictures: {html}")


def make_watch(stack: ExitStack) -> "values.OnPart":
    """Return what shows how far a comparison is."""
    advance: list[values.Advance] = []

    def watch(done_bytes: int, total_bytes: int, done: int, parts: int) -> None:
        if not advance:
            advance.append(stack.enter_context(console.open_progress(total_bytes, parts)))
        advance[0](done_bytes, done)

    return watch


def as_json(found: "values.Diff", *, tensors: bool) -> dict[str, Any]:
    """Return a comparison as JSON values; what is not finite is null."""
    numbers = asdict(found)
    if not tensors:
        del numbers["tensors"]
    kinds = {kind: [asdict(each) for each in sums] for kind, sums in _sum_kinds(found).items()}
    made: dict[str, Any] = _make_finite({**numbers, "kinds": kinds})
    return made


def _make_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _make_finite(each) for key, each in value.items()}
    return [_make_finite(each) for each in value] if isinstance(value, list | tuple) else value


def show(found: "values.Diff", *, tensors: bool) -> None:
    """Show a comparison as tables."""
    from mergemill.engine import reports

    for each in found.why_not:
        console.say(f"in the way of a merge: {each}")
    for side, name in enumerate(reports.name_sides(found)):
        console.say(f"{name}:")
        heads = ("kind", "tensors", "identical", "change", "cosine", "equal", "rank")
        rows = [(kind, *_tell(sums[side])) for kind, sums in _sum_kinds(found).items()]
        console.say_table(rows, heads=heads, right=range(1, len(heads)))
        console.say()
    listed = found.tensors if tensors else reports.list_most_changed(found, MOST_CHANGED)
    if not listed:
        console.say("nothing changed" if found.tensors else "nothing to compare: no tensor of one shape is in both")
        return
    console.say("tensors:" if tensors else "changed most:")
    changes = ["change"] if len(found.models) == 2 else ["first", "second"]
    titles = ("tensor", *changes, "cosine", "signs", "equal", "rank")
    console.say_table(list(_tensor_rows(listed)), heads=titles, right=range(1, len(titles)))


def _sum_kinds(found: "values.Diff") -> dict[str, list["reports.GroupChange"]]:
    from mergemill.engine import reports

    groups = reports.group_by_kind(found) | {"all": list(found.tensors)}
    sides = range(len(reports.name_sides(found)))
    return {kind: [reports.sum_up(each, side) for side in sides] for kind, each in groups.items()}


def _tell(group: "reports.GroupChange") -> tuple[str, ...]:
    from mergemill.engine.reports import say_number, say_share

    counts = f"{group.tensors:,}", f"{group.identical:,}"
    shares = say_share(group.relative), say_number(group.cosine), say_share(group.unchanged)
    return *counts, *shares, say_number(group.rank)


def _tensor_rows(listed: "list[values.TensorDiff] | tuple[values.TensorDiff, ...]") -> Iterator[tuple[str, ...]]:
    from mergemill.engine.reports import say_number, say_share

    for each in listed:
        if not each.deltas:
            yield each.name, "identical" if each.identical else "not identical"
            continue
        changes = [say_share(delta.relative) for delta in each.deltas]
        last = each.deltas[-1]
        rest = say_number(each.cosine), say_share(each.signs), say_share(last.unchanged), say_number(last.rank)
        yield each.name, *changes, *rest

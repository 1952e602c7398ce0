"""``mergemill inspect``: what a model, an adapter or a merge is, from headers alone."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, StorageAs, read_storage

if TYPE_CHECKING:
    from mergemill.engine import values

Folder = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model, an adapter or a merge: a folder, s3://…, or org/name.")
]
Tree = Annotated[bool, typer.Option("--tree", help="Look for the cards of its base models, and of theirs, on the Hub.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


def inspect(
    path: Folder,
    tensors: Tensors = False,
    tree: Tree = False,
    storage_as: StorageAs = None,
    cluster: ClusterAs = None,
    json: Json = False,
) -> None:
    """Show a model's layers, sizes and origin.

    Example: mergemill inspect merged --tensors
    """
    from mergemill.engine import inspect as inspect_folder

    found = inspect_folder(path, family_tree=tree, storage_options=read_storage(storage_as, cluster))
    if json:
        console.say_json(as_json(found, tensors=tensors))
        return
    console.say_table(list(list_facts(found)))
    if tensors:
        console.say()
        console.say_table(list(_tensor_rows(found)), heads=("tensor", "dtype", "shape", "size"), right=(3,))


def as_json(found: "values.Inspection", *, tensors: bool) -> dict[str, Any]:
    """Return an inspection as JSON values: the number of tensors, and with `tensors` also each of them."""
    numbers = asdict(found) | {
        "tensors": len(found.tensors),
        "parameters": found.parameters,
        "nbytes": found.nbytes,
    }
    if tensors:
        numbers["tensor_list"] = [asdict(tensor) | {"nbytes": tensor.nbytes} for tensor in found.tensors]
    return numbers


def list_facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    """Yield what headers say of a model, as names and values."""
    from mergemill.engine import format_size

    yield "path", found.path
    yield "kind", f"{found.kind}, {found.state}" if found.state else found.kind
    if found.digest:
        yield "digest", found.digest[:12]
    if not found.tensors:
        return
    if found.model_type:
        yield "model", found.model_type
    yield from _layer_facts(found)
    yield from _vocabulary_facts(found)
    if found.quantization:
        yield "quantized", found.quantization
    yield from _adapter_facts(found)
    yield "tensors", f"{len(found.tensors):,}"
    yield "parameters", f"{found.parameters:,}"
    for dtype, nbytes in found.dtypes.items():
        yield "dtype", f"{dtype}, {format_size(nbytes)}"
    for kind, nbytes in found.kinds.items():
        yield "bytes", f"{kind}, {format_size(nbytes)} ({nbytes / max(found.nbytes, 1):.1%})"
    yield "size", f"{format_size(found.nbytes)} in {console.count(found.shards, 'file')}"
    yield from _card_facts(found)


def _layer_facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    for stack, layers in found.layers.items():
        yield "layers", f"{layers} ({stack})"
        for group in (group for group in found.groups if group.stack == stack):
            said = f"; {', '.join(group.said)}" if group.said else ""
            yield "", f"{group.layers}: {group.kind}{said}"


def _vocabulary_facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    if found.vocabulary is None:
        return
    for name, rows in found.vocabulary.rows.items():
        unlike = found.vocabulary.said not in (None, rows)
        yield "vocabulary", f"{rows:,} ({name})" + (f"; the config says {found.vocabulary.said:,}" if unlike else "")
    if found.vocabulary.tied:
        yield "ties", found.vocabulary.tied


def _adapter_facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    if found.factors:
        yield "adapter", f"{len(found.factors)} factors were left in the model, such as {found.factors[0]}"
    if (adapter := found.adapter) is None:
        return
    ranks = f" (from {adapter.ranks[0]} to {adapter.ranks[-1]})" if adapter.ranks else ""
    yield "adapter", f"{adapter.method} of rank {adapter.rank}{ranks}, alpha {adapter.alpha:g}"
    yield "base model", adapter.base or "its config says none"
    yield "targets", ", ".join(group_numbered(adapter.targets)) or "its config says none"
    yield "changes", ", ".join(f"{count} {name}" for name, count in adapter.modules.items()) or "no modules"
    if adapter.embeddings:
        yield "tokens", ", ".join(adapter.embeddings)
    if adapter.whole:
        yield "replaces", ", ".join(group_numbered(adapter.whole))
    yield (
        "as an input",
        f"refused: {adapter.refused}"
        if adapter.refused
        else "BASE+ADAPTER is taken, where its shapes are those of BASE",
    )


def group_numbered(names: Sequence[str]) -> list[str]:
    """Return the names with those as one that differ in a number alone, as those of experts and layers do.

    >>> group_numbered(["lm_head", *(f"layers.{i}.experts.{k}.up_proj" for i in (0, 1, 5) for k in range(32))])
    ['lm_head', 'layers.0-1,5.experts.0-31.up_proj (96)']
    """
    found = {tuple(name.split(".")): 1 for name in names}
    for at in range(max(map(len, found), default=0))[::-1]:
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for words in found:
            numbered = at < len(words) and words[at].isdecimal()
            groups.setdefault((*words[:at], "#", *words[at + 1 :]) if numbered else words, []).append(words)
        found = {_join_group(group, at): sum(found[words] for words in group) for group in groups.values()}
    return [".".join(words) + (f" ({count:,})" if count > 1 else "") for words, count in found.items()]


def _join_group(group: Sequence[tuple[str, ...]], at: int) -> tuple[str, ...]:
    """Return names that differ in the word `at`, a number, as one with runs in its place."""
    if len(group) == 1:
        return group[0]
    runs: list[list[int]] = []
    for number in sorted({int(words[at]) for words in group}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)
    return *group[0][:at], said, *group[0][at + 1 :]


def _card_facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    if (card := found.card) is None:
        return
    yield "license", card.license or "the card says none"
    if card.bases:
        yield "made from", f"{', '.join(card.bases)}" + (f" ({card.relation})" if card.relation else "")
    if found.ancestors is not None:
        lines = list(_draw_tree(card.bases, found, 0, set()))
        yield from zip(("tree", *[""] * len(lines)), lines, strict=False)


def _draw_tree(bases: Sequence[str], found: "values.Inspection", depth: int, shown: set[str]) -> Iterator[str]:
    """Yield a line for each ancestor, below the model that is made from it; each is followed once."""
    for name in bases:
        lineage, indent = (found.ancestors or {}).get(name), "  " * depth
        if lineage is None or name in shown:
            yield f"{indent}{name}: " + ("see above" if name in shown else "not looked for")
            continue
        shown.add(name)
        yield f"{indent}{name}: {lineage.unread or lineage.license or 'no license said'}"
        yield from _draw_tree(lineage.bases, found, depth + 1, shown)


def _tensor_rows(found: "values.Inspection") -> Iterator[tuple[str, str, str, str]]:
    from mergemill.engine import format_size

    for tensor in found.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        yield tensor.name, tensor.dtype, shape, format_size(tensor.nbytes)

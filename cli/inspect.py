"""``mergemill inspect``: what a folder holds, from headers alone."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.options import ClusterAs, Json, StorageAs, read_storage

if TYPE_CHECKING:
    from mergemill.engine import values

Folder = Annotated[str, typer.Argument(metavar="PATH", help="The folder of a model or a merge.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


def inspect(
    path: Folder, tensors: Tensors = False, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False
) -> None:
    """Show a model's tensors, layers and size.

    Example: mergemill inspect merged --tensors
    """
    from mergemill.engine import inspect as inspect_folder

    found = inspect_folder(path, storage_options=read_storage(storage_as, cluster))
    if json:
        console.say_json(as_json(found, tensors=tensors))
        return
    console.say_table(list(_facts(found)))
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


def _facts(found: "values.Inspection") -> Iterator[tuple[str, str]]:
    from mergemill.engine import format_size

    yield "path", found.path
    yield "kind", f"{found.kind}, {found.state}" if found.state else found.kind
    if found.digest:
        yield "digest", found.digest[:12]
    if not found.tensors:
        return
    if found.model_type:
        yield "model", found.model_type
    for stack, layers in found.layers.items():
        yield "layers", f"{layers} ({stack})"
    yield "tensors", f"{len(found.tensors):,}"
    yield "parameters", f"{found.parameters:,}"
    for dtype, nbytes in found.dtypes.items():
        yield "dtype", f"{dtype}, {format_size(nbytes)}"
    yield "size", f"{format_size(found.nbytes)} in {found.shards} file{'s' * (found.shards != 1)}"


def _tensor_rows(found: "values.Inspection") -> Iterator[tuple[str, str, str, str]]:
    from mergemill.engine import format_size

    for tensor in found.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        yield tensor.name, tensor.dtype, shape, format_size(tensor.nbytes)

"""``mergemill plan``: what a merge will read, write and need, without reading a weight."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.cli import console
from mergemill.cli.options import MEMORY, SHARD_SIZE, Json, Memory, Recipe, Seed, ShardSize


def plan(
    recipe: Recipe, memory: Memory = MEMORY, shard_size: ShardSize = SHARD_SIZE, seed: Seed = 0, json: Json = False
) -> None:
    """Show what a merge will read, write and need.

    Example: mergemill plan recipe.yml --memory 2GiB
    """
    from mergemill.engine import describe_plan, load_recipe, make_plan

    numbers = describe_plan(make_plan(load_recipe(recipe), seed=seed, shard_size=shard_size), memory=memory)
    if json:
        console.say_json(numbers)
        return
    for line in plan_lines(numbers):
        console.say(line)


def plan_lines(numbers: Mapping[str, Any]) -> Iterator[str]:
    """Yield a plan in a few lines, its warnings last."""
    from mergemill.engine import format_size

    files = _count(len(numbers["shards"]), "shard")
    yield f"{numbers['method']}: {_count(len(numbers['sources']), 'model')} into {_count(numbers['tensors'], 'tensor')}"
    yield f"  read    {format_size(numbers['read_bytes']):>10}"
    for source in numbers["sources"]:
        yield f"          {format_size(source['read_bytes']):>10}  {source['model']}: {_uses(source)}"
    yield f"  write   {format_size(numbers['write_bytes']):>10}  {files}, {_count(numbers['parts'], 'part')}"
    promised = format_size(numbers["memory_bytes"])
    yield f"  memory  {format_size(numbers['projected_bytes']):>10}  at most a task; {promised} promised to each worker"
    yield f"  digest  {numbers['digest'][:12]}"
    for warning in numbers["warnings"]:
        yield f"warning: {warning}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _uses(source: Mapping[str, Any]) -> str:
    """Say what becomes of a model's tensors."""
    uses = [f"{source[use]} {use}" for use in ("merged", "copied") if source[use]]
    uses += [f"{number} dropped ({rule})" for rule, number in source["dropped"].items()]
    return f"{_count(source['tensors'], 'tensor')}, {', '.join(uses) or 'none used'}"

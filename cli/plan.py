"""``mergemill plan``: what a merge will read, write and need, without reading a weight."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.console import count
from mergemill.cli.documents import plan_with_stages
from mergemill.cli.options import (
    DEVICE_MEMORY,
    SHARD_SIZE,
    Cluster,
    Device,
    DeviceMemory,
    Intersection,
    Json,
    KeepStages,
    Memory,
    Methods,
    Overwrite,
    Raw,
    Recipe,
    RoundStages,
    Seed,
    ShardSize,
    Threads,
    Tokens,
    Union,
    Workers,
)

if TYPE_CHECKING:
    from mergemill.engine import values

AnyOut = Annotated[
    str | None, typer.Argument(metavar="[OUT]", help="Where it would go: whether it can, and what writing there takes.")
]


def plan(
    recipe: Recipe,
    out: AnyOut = None,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    cluster: Cluster = None,
    device: Device = None,
    device_memory: DeviceMemory = DEVICE_MEMORY,
    shard_size: ShardSize = SHARD_SIZE,
    seed: Seed = 0,
    methods: Methods = None,
    raw: Raw = False,
    union: Union = False,
    intersection: Intersection = False,
    round_stages: RoundStages = False,
    keep_stages: KeepStages = None,
    overwrite: Overwrite = False,
    tokens: Tokens = False,
    json: Json = False,
) -> None:
    """Show what a merge will read, write and need.

    Example: mergemill plan recipe.yml --memory 2GiB
    """
    from mergemill.engine import check_output, check_places, describe_plan, load_cluster

    file = load_cluster(cluster) if cluster else None
    *kept, (_, found) = plan_with_stages(
        recipe,
        keep_stages,
        raw=raw,
        union=union,
        intersection=intersection,
        seed=seed,
        shard_size=shard_size,
        methods=methods or (),
        round_stages=round_stages,
        memory=memory,
        storage=file.storage if file else None,
    )
    crew: values.WorkerKeywords = {
        "memory": memory,
        "workers": workers,
        "threads": threads,
        "cluster": file,
        "device": device,
        "device_memory": device_memory,
    }
    numbers = describe_plan(found, out=out, **crew)
    placed = [(str(place), stage) for place, stage in kept] + ([] if out is None else [(out, found)])
    check_places(placed, overwrite=overwrite, **crew)
    for place, each in placed:
        check_output(each, place, overwrite=overwrite, **crew)
    told = asdict(found.tokens) if tokens and found.tokens is not None else None
    if json:
        console.say_json({**numbers, "tokens": told} if tokens else numbers)
        return
    for line in plan_lines(numbers):
        console.say(line)
    if tokens:
        for line in token_lines(told):
            console.say(line)


def plan_lines(numbers: Mapping[str, Any]) -> Iterator[str]:
    """Yield a plan in a few lines, its warnings last."""
    from mergemill.engine import format_size

    stored = [source for source in numbers["sources"] if not source["is_stage"]]
    models, tensors = count(len(stored), "model"), count(numbers["tensors"], "tensor")
    yield f"{numbers['method']}: {models} into {tensors}"
    yield f"  dtype   {numbers['dtype']}"
    if numbers["donor"]:
        whose = "of" if "; tokenizer of " in numbers["donor"] else "and tokenizer of"
        yield f"  config  {whose} {numbers['donor']}"
    yield f"  read    {format_size(numbers['read_bytes']):>10}"
    for source in numbers["sources"]:
        read = "stage" if source["is_stage"] else format_size(source["read_bytes"])
        yield f"          {read:>10}  {source['model']}: {_uses(source)}"
    if numbers["first_pass_bytes"]:
        yield f"          {format_size(numbers['first_pass_bytes']):>10}  once before, for the coefficients' norms"
    if gates := numbers["gates"]:
        prompts, tokens = count(gates["prompts"], "prompt"), count(gates["tokens"], "token")
        passed = f"{prompts} of {tokens}, gates by {gates['mode']}, {format_size(gates['worker_bytes'])} of one worker"
        yield f"          {format_size(gates['read_bytes']):>10}  once before, for {passed}"
    shards, parts = count(len(numbers["shards"]), "shard"), count(numbers["parts"], "part")
    yield f"  write   {format_size(numbers['write_bytes']):>10}  {shards}, {parts}"
    for traffic in numbers["remote"]:
        yield from _remote_lines(traffic)
    projected, promised = format_size(numbers["projected_bytes"]), format_size(numbers["memory_bytes"])
    workers, threads = count(numbers["workers"], "worker"), count(numbers["threads"], "thread")
    crew = f"those of {numbers['scheduler']}" if numbers["scheduler"] else f"{workers} of {threads}"
    if numbers["cluster"]:
        crew = f"those of {numbers['cluster']}, of {threads}"
    yield f"  memory  {projected:>10}  at most, of {promised} promised to each worker; {crew}"
    if numbers["device"] != "cpu":
        need, device_promised = (
            format_size(numbers["device_bytes"]),
            format_size(numbers["device_memory_bytes"]),
        )
        there = f"{numbers['device_tensors']:,} of {numbers['tensors']:,} tensors are merged there"
        yield f"  {numbers['device']:<6}  {need:>10}  at least, of {device_promised} promised to each worker; {there}"
    yield f"  digest  {numbers['digest'][:12]}"
    for code in numbers["code"]:
        yield f"  code    {code['path']}, sha256 {code['sha256']}: is run by this merge"
    for warning in numbers["warnings"]:
        yield f"warning: {warning}"


def token_lines(told: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what becomes of tokens: the new ones, those that become added ones, and whose rows are given to others."""
    if told is None:
        yield "tokens: as the models have them; 'tokenizer_source' in the recipe says how vocabularies are joined"
        return
    yield f"tokens: those of {told['source']}, {count(len(told['added']), 'new token')}"
    for token, number in told["added"]:
        yield f"  new     {number:>7}  {token!r}"
    for token, number, model in told["marked"]:
        yield f"  added   {number:>7}  {token!r}: matched before the model, as in {model}"
    for row in told["rows"]:
        given = " and ".join(f"{model} row {number}" for model, number in row["rows"]) or "zeros"
        given = f"the mean of {given}" if len(row["rows"]) > 1 else given
        lacking = ", ".join(row["lacking"])
        whom = "all" if row["forced"] else f"{lacking}, which lack{'s' if len(row['lacking']) == 1 else ''} it"
        made = f"by {row['approximated']}, after " if row["approximated"] else ""
        kind = "forced " if row["forced"] else "missing"
        yield f"  {kind} {row['number']:>7}  {row['token']!r} in {row['tensor']}: {made}{given} for {whom}"


def _remote_lines(traffic: Mapping[str, Any]) -> Iterator[str]:
    """Yield what goes to and from one kind of storage."""
    from mergemill.engine import format_size

    scheme = traffic["scheme"]
    if traffic["read_requests"]:
        requests = count(traffic["read_requests"], "request")
        yield f"  {scheme:<6}  {format_size(traffic['read_bytes']):>10}  read in about {requests}"
    if traffic["most_read_bytes"] > traffic["read_bytes"]:
        most = count(traffic["most_read_requests"], "request")
        yield f"          {format_size(traffic['most_read_bytes']):>10}  at most, {most}, for what memory cannot keep"
    if traffic["write_requests"]:
        requests = count(traffic["write_requests"], "request")
        yield f"  {scheme:<6}  {format_size(traffic['write_bytes']):>10}  written in about {requests}"


def _uses(source: Mapping[str, Any]) -> str:
    """Say what becomes of a model's tensors."""
    uses = [f"{source[use]} {use}" for use in ("merged", "copied") if source[use]]
    uses += [f"{number} dropped ({rule})" for rule, number in source["dropped"].items()]
    return f"{count(source['tensors'], 'tensor')}, {', '.join(uses) or 'none used'}"

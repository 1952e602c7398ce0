"""``mergemill merge``: from a recipe to a checkpoint, with progress, to be stopped and resumed."""

import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.crew import make_crew
from mergemill.cli.documents import plan_with_stages
from mergemill.cli.groups import SHOWN, STORAGE
from mergemill.cli.options import (
    DEVICE_MEMORY,
    SHARD_SIZE,
    Cache,
    CacheFolder,
    Cluster,
    Device,
    DeviceMemory,
    Intersection,
    KeepStages,
    Memory,
    Methods,
    Overwrite,
    Raw,
    Reader,
    Recipe,
    RoundStages,
    Scheduler,
    Seed,
    ShardSize,
    StorageOf,
    Threads,
    Union,
    Wait,
    Workers,
)
from mergemill.cli.pages import check_page, write_page
from mergemill.cli.plan import plan_lines
from mergemill.cli.raw import RAW_WORDS
from mergemill.cli.signals import Interrupted, hold_back, let_through, raise_interrupts
from mergemill.cli.status import run_in
from mergemill.cli.variables import say_again

if TYPE_CHECKING:
    from mergemill.engine import events, values

_FACTOR = ".lora_"  # in the names of an adapter's factors
EVENTS = {"Waiting": "waiting", "Started": "started", "PartFinished": "part", "Committed": "committed"}

NewOut = Annotated[
    str, typer.Argument(metavar="OUT", help="A folder, s3://… or hf://org/name: new, empty, or this merge unfinished.")
]
Public = Annotated[
    bool, typer.Option("--public", help="Let everybody see a repository made on the Hub.", rich_help_panel=STORAGE)
]
Report = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Write a page there of what the merge changed, such as report.html.", rich_help_panel=SHOWN
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=SHOWN)]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON event a line.", rich_help_panel=SHOWN)]


def merge(
    context: typer.Context,
    recipe: Recipe,
    out: NewOut,
    workers: Workers = None,
    threads: Threads = None,
    memory: Memory = None,
    scheduler: Scheduler = None,
    wait: Wait = 0.0,
    cluster: Cluster = None,
    device: Device = None,
    device_memory: DeviceMemory = DEVICE_MEMORY,
    storage_as: StorageOf = None,
    cache: Cache = None,
    cache_folder: CacheFolder = None,
    reader: Reader = None,
    public: Public = False,
    overwrite: Overwrite = False,
    shard_size: ShardSize = SHARD_SIZE,
    seed: Seed = 0,
    methods: Methods = None,
    raw: Raw = False,
    union: Union = False,
    intersection: Intersection = False,
    round_stages: RoundStages = False,
    keep_stages: KeepStages = None,
    report: Report = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Merge models as a recipe says, or resume that.

    Example: mergemill merge recipe.yml merged --memory 2GiB --cache 50GB
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        if report:
            check_page(report)
        from mergemill.engine import check_places, values

        crew: values.WorkerKeywords = {
            **make_crew(
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
            ),
            "device": device,
            "device_memory": device_memory,
        }
        *kept, (_, plan) = plan_with_stages(
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
            storage=values.WorkerOptions(**crew).find_storage(),
        )
        if report and plan.origin.kind not in RAW_WORDS.keys() | {"merge"} and plan.gates is None:
            raise typer.BadParameter(
                f"--report compares a model with its base, or shows a router that is made from prompts, and this is of "
                f"the kind {plan.origin.kind}"
            )
        shown = {"public": public, "overwrite": overwrite, "quiet": quiet, "json": json}
        check_places([*((str(place), stage) for place, stage in kept), (out, plan)], overwrite=overwrite, **crew)
        for place, stage in kept:
            run_plan(context, stack, stage, str(place), crew, **shown)
        committed = run_plan(context, stack, plan, out, crew, **shown)
        if report:
            write_report(plan, committed, crew, report)


def run_plan(
    context: typer.Context,
    stack: ExitStack,
    plan: "values.Plan",
    out: str,
    crew: "values.WorkerKeywords",
    *,
    public: bool,
    overwrite: bool,
    quiet: bool,
    json: bool,
) -> "events.Committed":
    """Show a plan and run it, whatever it makes, or resume that; `stack` closes what shows it."""
    from mergemill.engine import describe_plan, run

    watch = Screen(stack, quiet=quiet, json=json)
    numbers = describe_plan(plan, out=out, **crew)
    watch.show_plan(numbers)
    resume, resume_anywhere = find_resume(context)
    with _say_how_to_resume(watch, resume), raise_interrupts(), hold_back(processes=numbers["processes"]):
        return run(plan, out, public=public, overwrite=overwrite, resume=resume_anywhere, on_event=watch, **crew)


def write_report(
    plan: "values.Plan", committed: "events.Committed", crew: "values.WorkerKeywords", report: str
) -> None:
    """Write the page of what a merge changed of its base, or of its first model, and of what the guard found."""
    from mergemill.engine import diff

    if plan.gates is not None:
        write_routing(plan, committed, report)
        return
    stored = {source.model: source.path for source in plan.sources if not source.is_stage}
    first = stored.get(str(plan.origin.value.get("base_model")), next(iter(stored.values())))
    asked: values.WorkerKeywords = {**crew, "storage": {**(crew.get("storage") or {}), **plan.storage}}
    found = diff(first, committed.out, **asked)
    faults = [f"{fault.tensor} {fault.fault}" for fault in committed.guard.faults]
    facts = [
        ("method", plan.origin.title),
        ("models", ", ".join(stored)),
        ("digest", plan.digest),
        ("seed", str(plan.origin.seed)),
        ("guard", "; ".join(faults) or "found nothing"),
        *(("warning", warning) for warning in plan.warnings),
    ]
    write_page(found, report, title=f"What {plan.origin.title} changed", facts=facts)


def write_routing(plan: "values.Plan", committed: "events.Committed", report: str) -> None:
    """Write the page of what a mixture's router does with its prompts."""
    from pathlib import Path

    from mergemill.engine import reports

    if committed.routing is None:
        raise typer.BadParameter(f"--report: {committed.out} was finished before; its card has what its router does")
    facts = [
        ("mixture", plan.origin.title),
        ("models", ", ".join(source.model for source in plan.sources if not source.is_stage)),
        ("digest", plan.digest),
        *(("warning", warning) for warning in plan.warnings),
    ]
    page = reports.make_routing_page(committed.routing, title="What the router does", facts=facts)
    Path(report).write_text(page, "utf-8")


class Screen:
    """Shows a merge as it goes on: to a person, to a program, or only its errors."""

    def __init__(self, stack: ExitStack, *, quiet: bool, json: bool) -> None:
        self._stack = stack  # closes the progress
        self._quiet = quiet
        self._json = json
        self._advance: values.Advance | None = None
        self.done = self.parts = 0  # parts

    def show_plan(self, numbers: Mapping[str, Any]) -> None:
        """Show the plan, before anything is written."""
        with console.even_unheard():
            if self._json:
                console.say_json({"event": "plan", **numbers}, indent=None)
            elif not self._quiet:
                for line in plan_lines(numbers):
                    console.note(line)

    def __call__(self, event: "events.Event") -> None:
        """Show an event of the engine."""
        from mergemill.engine import events

        if isinstance(event, events.Waiting):
            let_through()  # what is started here is started; the wait may be long
        elif isinstance(event, events.Started):
            self.parts = event.parts
            let_through()
        elif isinstance(event, events.PartFinished):
            self.done = event.parts_done
        with console.even_unheard():  # a merge is its files; who waits for it has the exit code
            self._tell(event)

    def _tell(self, event: "events.Event") -> None:
        if self._json:
            console.say_json({"event": EVENTS[type(event).__name__], **asdict(event)}, indent=None)
        elif not self._quiet:
            self._show(event)

    def _show(self, event: "events.Event") -> None:
        from mergemill.engine import events

        if isinstance(event, events.Waiting):
            console.note(describe_wait(event))
        elif isinstance(event, events.Started):
            for line in start_lines(event):
                console.note(line)
            self._advance = self._stack.enter_context(console.open_progress(event.write_bytes, event.parts))
        elif isinstance(event, events.PartFinished):
            assert self._advance is not None
            self._advance(event.done_bytes, event.parts_done, kept=event.kept)
        else:
            self._stack.close()
            for line in (*guard_lines(event), *(f"warning: {warning}" for warning in event.warnings)):
                console.note(line)
            console.say(describe_commit(event))


def describe_wait(event: "events.Waiting") -> str:
    """Return what is waited for, and where to look when it does not come."""
    if event.missing == "scheduler":
        so_far = f"it has not answered for {event.waited_s:.0f} s; " if event.waited_s else ""
        return f"{event.cluster}: {so_far}waiting for this scheduler"
    if not event.waited_s:
        return f"{event.cluster}: waiting for its first worker"
    return (
        f"{event.cluster}: no worker has come for {event.waited_s:.0f} s; still waiting. Look at the queue, and at the "
        "logs of what runs: a worker must start there and reach the scheduler"
    )


def start_lines(event: "events.Started") -> Iterator[str]:
    """Yield who works, and what of the work is done already."""
    from mergemill.engine import format_size

    workers, threads = console.count(event.workers, "worker"), console.count(event.threads, "thread")
    dashboard = f"; dashboard: {event.dashboard}" if event.dashboard else ""
    yield f"{workers} of {threads} and {format_size(event.memory_bytes)}{dashboard}"
    yield from (f"warning: {warning}" for warning in event.warnings)
    if event.resumed_parts:
        yield f"resuming: {event.resumed_parts:,} of {console.count(event.parts, 'part')} are done and are only checked"


def guard_lines(event: "events.Committed") -> Iterator[str]:
    """Yield the tensors that changed most, and what the guard found wrong."""
    factors = [change for change in event.guard.most_changed if _FACTOR in change.tensor]
    if factors:
        yield "largest errors, as a share of what changed:"
    for change in factors:
        yield f"{'not finite' if change.change is None else f'{change.change:.3%}':>12}  {_name_module(change.tensor)}"
    merged = [change for change in event.guard.most_changed if change not in factors]
    if merged:
        yield "most changed, as a share of the base's norm, and beside the largest change of an input:"
    for change in merged:
        unknown = "not finite" if change.broken else "from zero"
        share = f"{unknown:>12}" if change.change is None else f"{change.change:12.3%}"
        beside = " " * 8 if change.growth is None else f"{change.growth:7.3g}×"
        yield f"{share}  {beside}  {change.tensor}"
    for fault in event.guard.faults:
        kept = "; the base's tensor was kept" if fault.kept_base else ""
        yield f"warning: {fault.tensor} {fault.fault}{kept}"
    if event.routing and event.routing["own"]:
        own = event.routing["own"]
        share = sum(own) / len(own)
        yield f"router: an expert of its own is picked for {share:.0%} of the prompts, {_say_layers(len(own))}"


def _say_layers(count: int) -> str:
    return "in one layer" if count == 1 else f"over {count} layers"


def _name_module(factor: str) -> str:
    """Return the module that a factor of an adapter is of.

    >>> _name_module("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return factor.removeprefix("base_model.model.").partition(_FACTOR)[0]


def describe_commit(event: "events.Committed") -> str:
    """Return the result of a merge in one line."""
    from mergemill.engine import format_size

    check = f"check it with: mergemill verify {shlex.quote(event.out)}"
    if not event.redone_parts and not event.seconds:
        return f"{event.out}: this merge is finished already; {check}"
    parts = console.count(event.parts, "part")
    redone = f" ({event.redone_parts:,} in this run)" if event.redone_parts < event.parts else ""
    return f"{event.out}: {format_size(event.write_bytes)} in {parts}{redone}, {event.seconds:.1f} s; {check}"


def find_resume(context: typer.Context) -> tuple[str, str]:
    """Return the commands that go on with this merge, from here and from anywhere: itself, or what submitted it."""
    from mergemill.engine import jobs

    command, folder = jobs.find_resume(say_again(context))
    return command, run_in(folder, command)


@contextmanager
def _say_how_to_resume(watch: Screen, command: str) -> Iterator[None]:
    from mergemill.engine.errors import Cancelled

    try:
        yield
    except (Interrupted, Cancelled) as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        parts = console.count(watch.parts, "part")
        progress = f" after {watch.done:,} of {parts}" if watch.parts else " before the first part"
        raise Interrupted(number, f"{stop}{progress}; go on with: {command}") from None


@contextmanager
def errors_as_events() -> Iterator[None]:
    """Print an error as an event too, for `--json`."""
    try:
        yield
    except (Exception, Interrupted) as error:
        if not isinstance(error, BrokenPipeError):
            with console.even_unheard():
                console.say_json(console.error_event(error), indent=None)
        raise

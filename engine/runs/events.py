"""What a run tells its caller while it goes on; the engine itself never prints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.plan.show import Facts, list_names, show_html, show_text
from mergemill.engine.plan.sizes import format_size, say_count
from mergemill.engine.runs.outputs.receipts import Receipt
from mergemill.engine.runs.tasks.guard import Report

__all__ = ["Committed", "Event", "OnEvent", "PartFinished", "Started", "Waiting"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A cluster has no worker, or its scheduler does not answer yet; a queue may take its time."""

    cluster: str  # the cluster file, or the address or file of a scheduler
    waited_s: float = 0.0  # so far; told again while none comes
    missing: str = "worker"  # or scheduler


@dataclass(frozen=True, slots=True)
class Started:
    """Workers are there and the first parts are on their way."""

    out: str
    digest: str
    workers: int
    threads: int  # of each worker
    memory_bytes: int  # promised to each worker
    dashboard: str  # address of the Dask dashboard; empty where threads of this process work
    parts: int  # of the plan
    resumed_parts: int  # finished by an earlier run; they are only checked
    write_bytes: int  # of all parts
    warnings: tuple[str, ...] = ()  # about the cluster


@dataclass(frozen=True, slots=True)
class PartFinished:
    """A part is written."""

    receipt: Receipt
    kept: bool  # it was finished by an earlier run and is as its receipt says; or before `attach` looked
    parts_done: int
    done_bytes: int  # written by all parts so far
    read_bytes: int  # read from the sources so far


@dataclass(frozen=True, slots=True, repr=False)
class Committed:
    """The output is a checkpoint now."""

    out: str
    digest: str
    parts: int
    redone_parts: int  # merged in this run
    write_bytes: int  # of all shards
    read_bytes: int  # from the sources in this run
    seconds: float  # of this run
    guard: Report  # which tensors came out broken, and which changed most
    warnings: tuple[str, ...] = ()  # about where it ran, and of the routers of a mixture
    routing: Mapping[str, Any] | None = None  # of a mixture whose routers are made from prompts: see `make_report`
    losses: Mapping[str, float | None] | None = None  # of an adapter: ‖D − BA‖ / ‖D‖ of each module, the largest first

    def __repr__(self) -> str:
        return show_text(*self._show())

    def _repr_html_(self) -> str:
        return show_html(*self._show())

    def _show(self) -> tuple[str, Facts]:
        faults = [f"{found.tensor} {found.fault}" for found in self.guard.faults]
        most = [
            f"{found.tensor} {'not finite' if found.change is None else f'{found.change:.3%}'}"
            for found in self.guard.most_changed
        ]
        parts = say_count(self.parts, "part")
        return f"Committed: {self.out}", (
            ("wrote", f"{format_size(self.write_bytes)} in {parts}, {self.redone_parts:,} in this run"),
            ("read", format_size(self.read_bytes)),
            ("took", f"{self.seconds:.1f} s"),
            ("guard", f"{len(faults)}: {list_names(faults)}" if faults else "nothing found"),
            ("changed", list_names(most) or "not compared"),
            ("digest", self.digest[:12]),
            *(("warning", warning) for warning in self.warnings),
        )


Event = Waiting | Started | PartFinished | Committed
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with an event."""

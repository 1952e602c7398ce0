"""The runs below a root as browsers see them: those that the page started, and all others that lie there."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergemill.cli import console
from mergemill.cli.page import jobs, shelf
from mergemill.cli.page.jobs import COMPARE, MERGE, SEARCH, Errand
from mergemill.cli.page.results import find_report
from mergemill.cli.page.roots import check_out
from mergemill.cli.page.routing import make_routing_table
from mergemill.cli.status import say_resume
from mergemill.engine import errors, format_size, format_time, values
from mergemill.engine import status as find_status

LEAST_S, SHELF_S = 1.0, 5.0  # between two looks at an output, and at what there is
MOST_SHARE = 0.02  # of a core, that each of them may take
WORDS = {
    "starting": "starting",
    "running": "running",
    "cancelling": "is being cancelled",
    "unfinished": "stopped",
    "finished": "finished",
    "failed": "failed",
}


class OutputWatch:
    """Looks at what lies on disks, but not more often than it may cost, whoever and however many ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, Any]] = {}  # by what is looked at: until when, and what was seen

    def look(self, out: str) -> "values.Status | None":
        """Return the status of a merge; None where there is none yet, or nobody can say."""
        found: values.Status | None = self._see(f"out {out}", lambda: _read_status(out), LEAST_S)
        return found

    def list_outputs(self, root: Path) -> list[str]:
        """Return the outputs below a root."""
        found: list[str] = self._see("outputs", lambda: shelf.list_outputs(root), SHELF_S)
        return found

    def list_searches(self, root: Path) -> list[str]:
        """Return the folders of searches below a root."""
        found: list[str] = self._see("searches", lambda: shelf.list_searches(root), SHELF_S)
        return found

    def list_models(self, root: Path) -> list[dict[str, str]]:
        """Return the models below a root."""
        found: list[dict[str, str]] = self._see("models", lambda: shelf.list_models(root), SHELF_S)
        return found

    def forget(self, out: str) -> None:
        """Look anew next time, at one output and at which there are."""
        for key in (f"out {out}", "outputs", "models"):
            self._seen.pop(key, None)

    def _see(self, key: str, look: Callable[[], Any], least_s: float) -> Any:
        until, found = self._seen.get(key, (-math.inf, None))
        began = self._clock()
        if began >= until:
            found = look()
            self._seen[key] = began + max(least_s, (self._clock() - began) / MOST_SHARE), found
        return found


def _read_status(out: str) -> "values.Status | None":
    try:
        return find_status(out)
    except errors.MergemillError:
        return None


def list_runs(root: Path, watch: OutputWatch) -> list[dict[str, Any]]:
    """Return all runs, in short, the latest first."""
    jobs.reap()
    known = {job.name: job for job in jobs.list_jobs(root)}
    told = [_sum_up(root, job, watch) for job in known.values()]
    for out in watch.list_outputs(root):
        if jobs.make_name(MERGE, out) not in known:
            told.append(_sum_up(root, Errand(MERGE, out), watch))
    told += [_sum_up(root, Errand(SEARCH, folder), watch) for folder in watch.list_searches(root)]
    return sorted(told, key=lambda run: -run["since"])


def find_job(root: Path, name: str, watch: OutputWatch) -> Errand:
    """Return a run by its identity; `InputError` where there is none."""
    job = jobs.read_job(root, name)
    if job is None:
        lying = [Errand(MERGE, out) for out in watch.list_outputs(root)]
        lying += [Errand(SEARCH, folder) for folder in watch.list_searches(root)]
        job = next((each for each in lying if each.name == name), None)
        if job is None:
            raise errors.InputError("there is no such run below this folder")
    if job.kind == MERGE:
        check_out(root, job.out)
    return job


def describe_run(root: Path, job: Errand, watch: OutputWatch) -> dict[str, Any]:
    """Return all that is known of a run."""
    jobs.reap()
    found = watch.look(job.out) if job.kind == MERGE else None
    log = jobs.read_log(root, job.name)
    started = found.driver.started if found and found.driver else None
    return {
        **_sum_up(root, job, watch),
        "facts": list(_list_facts(found)) if found else [],
        "workers": f"{started['workers']} × {started['threads']} threads" if started else "",
        "dashboard": _check_link(started["dashboard"]) if started else "",
        "error": _find_error(job, found, log),
        "log": log,
        "recipe": jobs.read_recipe(root, job.name),
        "ours": bool(job.started),
        "report": find_report(root, job) is not None,
        "report_asked": job.report,
        "command": say_resume(found) if found and found.state == "unfinished" else "",
        "committed": _describe_commit(found),
    }


def cancel(job: Errand, watch: OutputWatch) -> None:
    """Ask a run to end so that it can be resumed; it does at its next slab."""
    from mergemill.engine import cancel as cancel_merge

    try:
        cancel_merge(job.out, wait_s=0.0)
    except errors.OutputError:
        if not jobs.is_alive(job):
            raise
        jobs.end(job)  # it has not begun to write
    watch.forget(job.out)


def _sum_up(root: Path, job: Errand, watch: OutputWatch) -> dict[str, Any]:
    found = watch.look(job.out) if job.kind == MERGE else None
    state = _find_state(root, job, found)
    share = found.done_bytes / found.write_bytes if found and found.write_bytes else 0.0
    since = job.started or (found.driver.since if found and found.driver else 0.0)
    rate = found.bytes_per_s if found else None
    return {
        "id": job.name,
        "kind": job.kind,
        "out": job.out,
        "title": " and ".join(job.words[:2]) if job.kind == COMPARE else job.out,
        "state": state,
        "said": WORDS[state],
        "live": state in ("starting", "running", "cancelling") or jobs.is_alive(job),
        "share": 1.0 if state == "finished" else share,
        "parts": f"{found.parts_done:,} of {found.parts:,}" if found and found.parts else "",
        "bytes": _say_bytes(found) if found and found.write_bytes else "",
        "rate": f"{format_size(rate)}/s" if rate else "",
        "left": format_time(found.left_s) if found and found.left_s is not None else "",
        "since": since,
    }


def _say_bytes(found: "values.Status") -> str:
    return f"{format_size(found.done_bytes)} of {format_size(found.write_bytes)}"


def _find_state(root: Path, job: Errand, found: "values.Status | None") -> str:
    alive = jobs.is_alive(job)
    if job.kind == SEARCH:
        return "finished"
    if job.kind != MERGE:
        return "running" if alive else "finished" if _ended_well(root, job) else "failed"
    if found is None:
        return "starting" if alive else "failed"
    if found.state == "unfinished":
        return "starting" if alive else "failed" if found.driver and found.driver.how == "failed" else "unfinished"
    return found.state


def _ended_well(root: Path, job: Errand) -> bool:
    """Whether a command that is no merge did what it was asked for: its log ends without an error."""
    log = jobs.read_log(root, job.name)
    return not log.rstrip().rpartition("\n")[2].startswith(("$ ", "mergemill: "))


def _find_error(job: Errand, found: "values.Status | None", log: str) -> str:
    if found and found.driver and found.driver.error and found.state != "finished":
        return found.driver.error
    last = log.rpartition("$ mergemill ")[2]
    told = next((line[18:] for line in last.splitlines() if line.startswith("mergemill: error: ")), "")
    lost = job.kind == MERGE and found is None and not jobs.is_alive(job)
    return told or ("nothing is at its output: it ended before it wrote there, or that was removed" if lost else "")


def _list_facts(found: "values.Status") -> Iterator[tuple[str, str]]:
    if found.old:
        yield "there", f"a finished merge, {found.old}, which this one replaces"
    if found.driver and found.driver.host:
        yield "driven by", found.driver.say_process() + (f", {found.driver.job}" if found.driver.job else "")
    if found.driver and found.driver.how:
        yield "ended", found.driver.how
    started = found.driver.started if found.driver else None
    if started:
        promised = format_size(started["memory_bytes"])
        yield "workers", f"{started['workers']} of {started['threads']} threads and {promised}"
        if started["resumed_parts"]:
            yield "resumed", f"{started['resumed_parts']:,} parts were done before"
    if found.digest:
        yield "seed", str(found.seed)
        yield "digest", found.digest[:12]


def _describe_commit(found: "values.Status | None") -> dict[str, Any] | None:
    """Return what the driver of a finished merge has said at its end."""
    told: Mapping[str, Any] | None = found.driver.committed if found and found.driver else None
    if not told or not found or found.state != "finished":
        return None
    return {
        "facts": [
            ("wrote", f"{format_size(told['write_bytes'])} in {console.count(told['parts'], 'part')}"),
            ("merged in the last run", f"{console.count(told['redone_parts'], 'part')} in {told['seconds']:.1f} s"),
            ("read in the last run", format_size(told["read_bytes"])),
        ],
        "changed": [
            (each["tensor"], "not finite" if each["change"] is None else f"{each['change']:.3%}")
            for each in told["guard"]["most_changed"]
        ],
        "faults": [f"{each['tensor']} {each['fault']}" for each in told["guard"]["faults"]],
        "warnings": list(told.get("warnings", ())),
        "routing": make_routing_table(told.get("routing")),
    }


def _check_link(given: object) -> str:
    """Return an address that a driver has noted, where it is of the web: whoever writes an output could note others."""
    return str(given) if re.match(r"https?://", str(given)) else ""

"""``mergemill status``: how far a merge is, who drives it, and how to go on."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mergemill.cli import console
from mergemill.cli.options import SHARD_SIZE, ClusterAs, Json, Out, StorageAs, read_storage, say_storage
from mergemill.cli.raw import RAW_WORDS

if TYPE_CHECKING:
    from mergemill.engine import values


def status(out: Out, storage_as: StorageAs = None, cluster: ClusterAs = None, json: Json = False) -> None:
    """Show how far a merge is, and who drives it.

    Example: mergemill status s3://bucket/merged
    """
    from mergemill.engine import status as find_status

    found = find_status(out, storage_options=read_storage(storage_as, cluster))
    if json:
        console.say_json(asdict(found))
        return
    console.say(f"{found.out}: {found.state}{say_progress(found)}")
    console.say_facts(list(list_facts(found, say_storage(storage_as, cluster))))


def say_progress(found: "values.Status") -> str:
    """Say how much of a merge is done, and how long the rest may take."""
    from mergemill.engine import format_size, format_time

    if not found.parts:
        return ", waiting for workers" if found.state == "running" else ""
    done, whole = format_size(found.done_bytes), format_size(found.write_bytes)
    text = f", {found.parts_done:,} of {console.count(found.parts, 'part')} ({done} of {whole})"
    if found.bytes_per_s:
        text += f", {format_size(found.bytes_per_s)}/s, about {format_time(found.left_s or 0)} left"
    return text


def list_facts(found: "values.Status", reach: str) -> Iterator[tuple[str, str]]:
    """Yield what is known, and what can be done; `reach` are the options by which commands reach storage."""
    if found.old:
        yield "there", f"a finished merge, {found.old}, which this one replaces"
    if found.driver is not None:
        yield from _driver_facts(found, found.driver)
    out = f"{shlex.quote(found.out)}{reach}"
    if found.state == "finished":
        yield "check", f"mergemill verify {out}"
    elif found.state == "unfinished":
        yield "resume", say_resume(found)
        kept = "  # the finished merge stays" if found.old == "whole" else ""
        yield "give up", f"mergemill abort {out}{kept}"
    else:
        yield "watch", f"mergemill attach {out}"
        yield "stop", f"mergemill cancel {out}"


def _driver_facts(found: "values.Status", driver: "values.Driver") -> Iterator[tuple[str, str]]:
    from mergemill.engine import format_size, format_time

    seen = f", last seen {format_time(found.seen_s)} ago" if found.seen_s is not None else ""
    if driver.host:
        yield "driver", f"{driver.say_process()}, since {_say_date(driver.since)}{seen}"
    if driver.job:
        yield "job", driver.job
    if driver.ended is not None:
        yield "ended", f"{_say_date(driver.ended)}, {driver.how}{f': {driver.error}' if driver.error else ''}"
    if driver.started is not None and driver.ended is None:
        workers, threads = (console.count(driver.started[name], name[:-1]) for name in ("workers", "threads"))
        yield "workers", f"{workers} of {threads} and {format_size(driver.started['memory_bytes'])}"
        if driver.started["dashboard"]:
            yield "dashboard", driver.started["dashboard"]


def say_resume(found: "values.Status") -> str:
    """Return the command that goes on with a merge from any directory, where its recipe still lies where it was."""
    if found.driver is not None and found.driver.resume:
        return found.driver.resume
    out = found.out if "://" in found.out else str(Path(found.out).absolute())
    words = ["mergemill", "merge", found.recipe or "RECIPE", out, *RAW_WORDS.get(found.kind, ())]
    if found.seed:
        words += ["--seed", str(found.seed)]
    if found.shard_size not in ("", SHARD_SIZE):
        words += ["--shard-size", found.shard_size]
    if found.chosen_memory_bytes is not None:
        words += ["--memory", str(found.chosen_memory_bytes)]
    if found.old:
        words.append("--overwrite")
    return run_in(found.driver.folder if found.driver else "", shlex.join(words))


def run_in(folder: str, command: str) -> str:
    """Return a command that does from any directory what `command` does in a folder.

    >>> run_in("/my models", "mergemill merge recipe.yml merged")
    "cd '/my models' && mergemill merge recipe.yml merged"
    """
    return f"cd {shlex.quote(folder)} && {command}" if folder else command


def _say_date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

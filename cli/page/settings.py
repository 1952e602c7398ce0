"""What the page was started with, and what a browser may choose for a run, checked before it becomes a command line."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergemill.engine.errors import InputError

_SIZE = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,18})? ?(?:[kKMGT]i?)?B?")
_MOST = {"workers": 1024, "threads": 1024, "seed": 2**63 - 1}


@dataclass(frozen=True, slots=True)
class Setup:
    """What `mergemill ui` was started with."""

    root: Path
    methods: tuple[str, ...] = ()  # files of methods of one's own, which all runs have
    scheduler: str = ""  # for all runs
    cluster: str = ""  # a cluster file, for all runs

    def list_words(self) -> list[str]:
        """Return the options that all merges have."""
        return [*(word for path in self.methods for word in ("--methods", path)), *self.list_crew_words()]

    def list_crew_words(self) -> list[str]:
        """Return the options that say where all runs work."""
        told = {"--scheduler": self.scheduler, "--cluster": self.cluster}
        return [word for option, value in told.items() if value for word in (option, value)]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a browser chooses for a run; empty and None stand for the command line's defaults."""

    memory: str = ""
    shard_size: str = ""
    workers: int | None = None
    threads: int | None = None
    seed: int = 0

    def list_words(self) -> list[str]:
        """Return the options of a command."""
        told = {name: value for name, value in asdict(self).items() if value not in ("", None, 0) or name == "workers"}
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in told.items() if value is not None]
        return [word for pair in words for word in pair]


def parse_chosen(given: Mapping[str, Any]) -> Chosen:
    """Return what JSON says; `InputError` for what is no size or no number.

    >>> parse_chosen({"memory": "2GiB", "workers": 0, "seed": ""}).list_words()
    ['--memory', '2GiB', '--workers', '0']
    """
    memory, shard_size = (str(given.get(name) or "").strip() for name in ("memory", "shard_size"))
    for name, text in (("memory", memory), ("shard size", shard_size if shard_size != "tensor" else "")):
        if text and not _SIZE.fullmatch(text):
            raise InputError(f"{name}: {text[:40]!r} is no size; write one such as 2GiB")
    numbers = {name: _parse_number(name, given.get(name)) for name in _MOST}
    return Chosen(memory, shard_size, numbers["workers"], numbers["threads"], numbers["seed"] or 0)


def _parse_number(name: str, given: object) -> int | None:
    if given in ("", None):
        return None
    try:
        number = int(str(given))
    except ValueError:
        number = -1
    if not (1 if name == "threads" else 0) <= number <= _MOST[name]:
        raise InputError(f"{name}: {str(given)[:40]!r} is no whole number from 0 to {_MOST[name]}")
    return number

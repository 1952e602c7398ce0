"""A driver of its own process, to be killed: ``python -m runs.driver '{"method": …}'``: a line for each event."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from runs.merging import plan_merge, slowed

from mergemill.engine import run
from mergemill.engine.errors import MergemillError
from mergemill.engine.runs.events import Committed, PartFinished, Started
from mergemill.engine.runs.outputs import folder


def main(wanted: dict[str, Any]) -> int:
    """Run one merge; exits as the command line does."""
    if wanted.get("die_at_rename"):
        _die_at_rename(wanted["die_at_rename"])
    plan = plan_merge(wanted["method"], Path(wanted["family"]), shard_size=wanted.get("shard_size", "5GB"))
    try:
        with slowed(wanted.get("slow_s", 0.0)):
            run(plan, wanted["out"], workers=wanted["workers"], threads=wanted["threads"], on_event=_say)
    except MergemillError as error:
        print(f"{type(error).__name__}: {error}", flush=True)  # noqa: T201
        return error.exit_code
    return 0


def _say(event: Started | PartFinished | Committed) -> None:
    print(type(event).__name__, flush=True)  # noqa: T201


def _die_at_rename(count: int) -> None:
    """Kill this process instead of renaming the `count`-th shard."""
    rename, left = folder.rename_file, [count]

    def rename_or_die(path: Path, target: Path) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(path, target)

    folder.rename_file = rename_or_die


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

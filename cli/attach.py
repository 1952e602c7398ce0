"""``mergemill attach``: the progress of a merge that runs somewhere else, as if it ran here."""

import shlex
from contextlib import ExitStack
from typing import Annotated

import typer

from mergemill.cli.merge import JsonLines, Screen, errors_as_events
from mergemill.cli.options import ClusterAs, Out, StorageAs, read_storage, say_storage
from mergemill.cli.signals import Interrupted, raise_interrupts

Wait = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="Wait so long for a driver, such as a job in a queue."),
]


def attach(
    out: Out, wait: Wait = 0.0, storage_as: StorageAs = None, cluster: ClusterAs = None, json: JsonLines = False
) -> None:
    """Watch a merge that runs anywhere until it ends.

    Ctrl-C leaves it alone.

    Example: mergemill attach s3://bucket/merged --wait 600
    """
    with ExitStack() as stack:
        if json:
            stack.enter_context(errors_as_events())
        from mergemill.engine import attach as attach_to

        try:
            with raise_interrupts():
                options = read_storage(storage_as, cluster)
                attach_to(out, wait_s=wait, storage_options=options, on_event=Screen(stack, quiet=False, json=json))
        except Interrupted as stop:
            look = f"mergemill status {shlex.quote(out)}{say_storage(storage_as, cluster)}"
            raise Interrupted(stop.number, f"{stop}; the merge goes on: {look}") from None

"""Planning without the collector of cyclic garbage.

A plan makes some dozens of objects a tensor, keeps nearly all of them, and none of them in a cycle. Python's collector
looks for cycles again and again meanwhile, each time at more of them: an eighth of the time, for nothing (2026-11-30).
At the end all that is there goes to the collector's oldest generation, where what it keeps goes: else it would look at
all of the plan at once.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Iterator[None]:
    """Switch the collector off, and on again where it was on; also a decorator."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # what somebody froze would be thawed
                gc.freeze()
                gc.unfreeze()
            gc.enable()

"""How large a small file may be: the one table of it.

A file of a model, a recipe or an output may be anybody's. It is asked for its size before a byte of it is read, so
that a plan takes a few megabytes whatever lies in the place of a config. Each bound is some ten times the largest that
was seen (2026-11-29). What is only copied passes through in pieces, and may be larger.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

CARD_BYTES = 128 << 10  # of a model card, which is read no further: its front matter ends there
RECIPE_BYTES = 1 << 20  # of a recipe, or a cluster file
METHODS_BYTES = 4 << 20  # of a file of methods
PROMPTS_BYTES = 64 << 20  # of a file of prompts
NOTE_BYTES = 1 << 20  # of a note of a driver, beside an output, or of a scheduler of where it is
STATE_BYTES = 1 << 30  # of plan, journal, receipts and uploads there, which grow with the tensors
COPIED_BYTES = 2 << 30  # of any other file beside a model's weights

_NOTES = ("driver.json", "cancel.json", "lease.json", "lock")
_PARSED: Mapping[str, int] = {
    "config.json": 16 << 20,
    "*.index.json": 256 << 20,
    "tokenizer.json": 256 << 20,
    "*.json": 64 << 20,
}


def find_bound(name: str) -> int:
    """Return the most bytes that a small file of a model has.

    >>> find_bound("a/config.json") >> 20, find_bound("vocab.json") >> 20, find_bound("tokenizer.model") >> 20
    (16, 64, 2048)
    """
    name = PurePosixPath(name).name
    return next((size for pattern, size in _PARSED.items() if fnmatchcase(name, pattern)), COPIED_BYTES)


def find_state_bound(name: str) -> int:
    """Return the most bytes that a file of mergemill's own has, which lies beside an output.

    >>> find_state_bound(".mergemill/driver.json") >> 20, find_state_bound("s3://b/.mergemill/plan.json") >> 20
    (1, 1024)
    """
    return NOTE_BYTES if PurePosixPath(name).name in _NOTES else STATE_BYTES

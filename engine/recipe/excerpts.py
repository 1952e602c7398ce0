"""Where in a file a fault is: its line as the file has it, and the columns that are meant.

A line that may hold a secret is not repeated: of a URL with a user or a query, or with a key such as a token's.
"""

import re
from collections.abc import Mapping

from mergemill.engine.errors import FileFault

MOST_COLUMNS = 160  # of a line that is shown
_MAY_HOLD_A_SECRET = re.compile(r"://.*[@?]|secret|token\b(?!s)|password|credential|_key|storage", re.IGNORECASE)


def point(text: str, line: int, key: str, words: str) -> FileFault:
    """Return a fault at `key` in a line of `text`, counted from 1; at all that stands there where the key does not.

    >>> point("merge_method: tiess\\n", 1, "merge_method", "is unknown")
    FileFault(words='is unknown', line=1, text='merge_method: tiess', column=0, width=12)
    """
    lines = text.splitlines()
    shown = lines[line - 1].rstrip()[:MOST_COLUMNS] if 0 < line <= len(lines) else ""
    if _MAY_HOLD_A_SECRET.search(shown):
        return FileFault(words, line, "", 0, 0)
    found = _find_key(shown, key) if key else None
    if found is None:
        inner = shown.strip().removeprefix("- ")
        return FileFault(words, line, shown, shown.find(inner), len(inner))
    return FileFault(words, line, shown, *found)


def find_keys(text: str, words: Mapping[str, str]) -> tuple[FileFault, ...]:
    """Return a fault at each place of `text` where one of the keys of `words` stands as a key, with its words."""
    return tuple(
        point(text, number, name, words[name])
        for number, line in enumerate(text.splitlines(), 1)
        for name in words
        if _find_key(line, name) is not None
    )


def _find_key(line: str, key: str) -> tuple[int, int] | None:
    """Return where a key stands in a line, and how wide it is."""
    found = re.search(rf"(?<![\w.-])[\"']?({re.escape(key)})[\"']?\s*:", line)
    return (found.start(1), len(key)) if found else None

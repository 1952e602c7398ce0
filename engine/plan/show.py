"""How values show themselves: a title and a few facts, as lines of text and as HTML for a notebook.

What they say comes from files that nobody vouches for: in text, characters that would move a cursor are escaped; in
HTML, everything is, and nothing is fetched or run.
"""

from collections.abc import Sequence
from html import escape

Facts = Sequence[tuple[str, str]]

MOST_CHARACTERS = 200  # of a fact
_MOST_NAMES = 3


def show_text(title: str, facts: Facts) -> str:
    """Return a line for the title, and one for each fact.

    >>> print(show_text("Plan", [("read", "1 KiB"), ("models", "a\\x1b[31m")]))
    Plan
      read    1 KiB
      models  a\\x1b[31m
    """
    width = max(len(name) for name, _ in facts)
    return "\n".join([_clean(title), *(f"  {name:<{width}}  {_clean(value)}" for name, value in facts)])


def show_html(title: str, facts: Facts) -> str:
    """Return a table, complete in itself.

    >>> show_html("a < b", [("read", "1 KiB")])
    '<table><caption>a &lt; b</caption><tr><th scope="row">read</th><td>1 KiB</td></tr></table>'
    """
    rows = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(_clean(value))}</td></tr>' for name, value in facts)
    return f"<table><caption>{escape(_clean(title))}</caption>{''.join(rows)}</table>"


def list_names(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are.

    >>> list_names(["a", "b"]), list_names(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _clean(text: str) -> str:
    """Return text that stays in its line, and is not too long for one."""
    cut = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)

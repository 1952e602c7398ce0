"""How a recipe's faults are said: plain sentences that pydantic carries to the place where they belong.

pydantic keeps the path of every value that it checks (``("models", 0, "parameters", "weight")``); the
validators of this room add the words. A *predicate* ("must be text, not the number 3") gets the key put
before it, a *sentence* stands alone. No message of pydantic's own is meant to reach a user.
"""

import difflib
from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Loc = tuple[int | str, ...]

_PREDICATE, _SENTENCE = "predicate", "sentence"
_SHOWN = 60  # characters of a user's text that a message repeats


def make_predicate(words: str) -> PydanticCustomError:
    """Return a fault whose message will be the key, then `words`."""
    return PydanticCustomError(_PREDICATE, "{words}", {"words": words})


def make_sentence(words: str) -> PydanticCustomError:
    """Return a fault whose message is `words` alone."""
    return PydanticCustomError(_SENTENCE, "{words}", {"words": words})


def make_faults(found: Iterable[tuple[Loc, PydanticCustomError]]) -> ValidationError:
    """Return one error for several faults, each at its path below the value that is being checked."""
    return ValidationError.from_exception_data(
        "recipe", [InitErrorDetails(type=fault, loc=loc, input=None) for loc, fault in found]
    )


def say(kind: str, loc: Loc, words: str) -> str:
    """Return the message of the fault of `kind` at `loc`.

    >>> say("predicate", ("parameters", "t", 1), "is nan")
    "'t' item 2 is nan"
    """
    return words if kind == _SENTENCE else f"{_name_place(loc)} {words}"


def _name_place(loc: Loc) -> str:
    keys = [place for place, part in enumerate(loc) if isinstance(part, str)]
    if not keys:
        return "the recipe"
    items = [f" item {int(part) + 1}" for part in loc[keys[-1] + 1 :]]
    return f"'{shorten(loc[keys[-1]])}'" + "".join(items)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the nearest known one, or all of them.

    >>> suggest("dtpye", ["dtype", "models"])
    "did you mean 'dtype'?"
    >>> suggest("x", ["dtype", "models"])
    'known here: dtype, models'
    """
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def is_near(word: str, known: Iterable[str]) -> bool:
    """Whether an unknown `word` is probably a known one misspelt."""
    return bool(difflib.get_close_matches(word.lower(), list(known), n=1))


def describe(value: object) -> str:
    """Return what a YAML value is, in a user's words.

    >>> describe(True), describe(3), describe("a"), describe([1]), describe(None)
    ('the boolean true', 'the number 3', "the text 'a'", 'a list', 'nothing')
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print the longest
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{shorten(value)}'"
    return "a mapping" if isinstance(value, Mapping) else "a list" if _is_list(value) else "binary data"


def shorten(value: object) -> str:
    """Return `value` as a message repeats it: on one line, cut where it is long."""
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(value).split()))
    return words if len(words) <= _SHOWN else words[:_SHOWN] + "…"


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)

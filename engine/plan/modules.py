"""Which module of a recipe a name of the model belongs to: by the name's own words, or by those that mergekit uses.

`language_model`, `visual.blocks` and `encoder` are words of real names. `text_decoder`, `vision_tower` and
`multi_modal_projector` are roles, which the architecture files of mergekit 0.1.5 use whatever the names are.
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from mergemill.engine.checkpoint.family import Family


def choose_module(name: str, modules: Sequence[str], family: Family, stacks: Collection[str] = ()) -> str | None:
    """Return the one of `modules` that a stack's or tensor's name belongs to; None where none says it.

    The module whose words stand last in the name: of `encoder` and `vision_tower`, an encoder's vision tower is the
    latter's. A module that is the whole name of one of the `stacks` is that stack alone, and not a tower's of the same
    last words. Roles are asked only where no words are there.
    """
    places = [(_find_words(name, module), len(module), module) for module in modules]
    places = [place for place in places if place[2] not in stacks or place[0] <= 0]
    place, _, best = max(places, default=(-1, 0, ""))
    if place >= 0:
        return best
    return next(
        (role for role, patterns in family.roles if role in modules and any(fnmatchcase(name, p) for p in patterns)),
        None,
    )


def _find_words(name: str, module: str) -> int:
    """Return where the words of a module begin in a name; -1 where they are not there.

    >>> _find_words("model.visual.blocks", "visual.blocks"), _find_words("model.visual.blocks", "blocks.visual")
    (1, -1)
    """
    words, wanted = name.split("."), module.split(".")
    starts = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
    return starts[0] if starts else -1

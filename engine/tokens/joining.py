"""The vocabulary of a merge's output: the source's tokens with their ids, and after them those that others have.

The ids of the source never move. After them come, in the order of the models and within a model by id: regular tokens
that only other models have, added tokens that only other models have; at last the tokens that a recipe asks for and
nobody has. So an id hangs on nothing but the recipe.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse

from mergemill.engine.tokens.extending import find_extension
from mergemill.engine.tokens.reading import FLAGS, AddedToken, Vocabulary

_SPECIAL = (("<|", "|>"), ("<", ">"), ("[", "]"))  # how a token looks that is no text


@dataclass(frozen=True, slots=True)
class Joined:
    """A vocabulary that is made of several."""

    source: str  # the model whose ids do not move
    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]  # by content, in the order of their ids
    regular: tuple[str, ...]  # new ones, in the order of their ids
    new: tuple[str, ...]  # new added tokens, in the order of their ids
    marked: Mapping[str, str]  # tokens of the source that become added, and the model that adds each
    conflicts: Mapping[str, tuple[tuple[str, AddedToken], ...]]  # tokens that models add with different flags
    like: str  # the model whose tokenizer's model it has: the source's, or one that extends it

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def is_source(self) -> bool:
        """Whether it is the source's vocabulary, and nothing else."""
        return not (self.regular or self.new or self.marked)


def join_vocabularies(
    vocabularies: Mapping[str, Vocabulary], source: str, *, union: bool, asked: Sequence[str] = ()
) -> Joined:
    """Return the vocabulary of the output; `vocabularies` are the models', in the order of the recipe.

    union: whether it has the tokens of all models. asked: tokens that it has in any case.
    """
    own = vocabularies[source]
    order = {source: own, **vocabularies}
    others = {model: each for model, each in vocabularies.items() if model != source} if union else {}
    adders = _find_adders(order)
    new = _list_new(others, own.ids)
    regular = [token for token in new if token not in adders]
    added = [token for token in new if token in adders]
    asked = [token for token in dict.fromkeys(asked) if token not in own.ids and token not in new]
    start = own.size
    ids = {**own.ids, **{token: start + i for i, token in enumerate([*regular, *added, *asked])}}
    marked = {
        token: model
        for model, each in others.items()
        for token in each.added
        if token in own.ids and token not in own.added and adders[token][0][0] == model
    }
    flagged = [*own.added, *marked, *added, *asked]
    found = {token: adders[token][0][1] if token in adders else guess_flags(token) for token in flagged}
    several = [token for token in flagged if len({each for _, each in adders.get(token, ())}) > 1]
    return Joined(
        source,
        ids,
        dict(sorted(found.items(), key=lambda each: ids[each[0]])),
        tuple(regular),
        (*added, *asked),
        marked,
        {token: tuple(adders[token]) for token in several} if union else {},
        find_extension(order, source) if regular else source,
    )


def guess_flags(token: str) -> AddedToken:
    """Return a token that no model has as one that is added: special where it looks like it.

    >>> guess_flags("<|im_end|>").special, guess_flags("[SEP]").special, guess_flags("harbour").special
    (True, True, False)
    """
    looks = len(token) > 2 and any(token.startswith(first) and token.endswith(last) for first, last in _SPECIAL)
    return AddedToken(token, tuple(flag == "special" and looks for flag in FLAGS))


def _find_adders(order: Mapping[str, Vocabulary]) -> dict[str, list[tuple[str, AddedToken]]]:
    """Return for each token that a model adds, all models that add it, with its flags there, the source first."""
    adders: dict[str, list[tuple[str, AddedToken]]] = {}
    for model, each in order.items():
        for token, added in each.added.items():
            adders.setdefault(token, []).append((model, added))
    return adders


def _list_new(others: Mapping[str, Vocabulary], known: Collection[str]) -> dict[str, None]:
    """Return the tokens that are not known, in the order of the models and within one by id."""
    found: dict[str, None] = {}
    for each in others.values():
        new = filterfalse(known.__contains__, each.ids)
        found |= dict.fromkeys(sorted(new, key=each.ids.__getitem__))
    return found


def warn_of_joined(joined: Joined, vocabularies: Mapping[str, Vocabulary]) -> Iterator[str]:
    """Yield what a union's tokenizer cannot do as its inputs' do, and flags that are not as all have them."""
    foreign = [token for token in joined.regular if token not in vocabularies[joined.like].ids]
    own = vocabularies[joined.source]
    if foreign and own.kind == "WordPiece":
        yield (
            f"{len(foreign):,} regular tokens of other models join the WordPiece vocabulary of {joined.source}, which "
            f"takes the longest that matches: texts that contain one are encoded otherwise than by {joined.source}"
        )
    if foreign and own.model.get("ignore_merges"):
        yield (
            f"the tokenizer of {joined.source} takes whole words past its merges (ignore_merges), so words that are "
            f"among the {len(foreign):,} regular tokens of other models are encoded otherwise than by it"
        )
    for token, found in joined.conflicts.items():
        (first, kept), (other, left) = found[0], next(each for each in found if each[1] != found[0][1])
        differing = [
            f"{flag} {here} and {there}"
            for flag, here, there in zip(FLAGS, kept.flags, left.flags, strict=True)
            if here != there
        ]
        yield f"token {token!r} is added by {first} and {other} with {', '.join(differing)}; those of {first} hold"

"""What a merge must give: a float64 NumPy oracle, written from spec/methods.md and spec/recipes.md alone.

It imports nothing of the engine, and no torch. A method is a function of arrays; `expected` is a whole merge.
It knows decoders whose layers are named `….layers.{i}.…`; dtypes, tokenizers, adapters and integer
buffers are the caller's.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import acos, floor, sin
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Level = Mapping[str, Any]
Load = Callable[[str], Mapping[str, Array]]
Mask = Callable[[str, str, tuple[int, ...], float], Bools]
"""(output tensor, model, shape, density) → which elements stay; for the random methods."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"(?P<stack>.*\blayers\.)(?P<i>\d+)(?P<rest>\..*)", re.DOTALL)
DELTA_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


# --------------------------------------------------------------------------------------------------- methods
def linear(tensors: Sequence[Array], *, weight: Sequence[float], normalize: bool = True) -> Array:
    """Return the weighted sum, over the sum of the weights when normalised."""
    total = sum_weighted(weight, tensors)
    return total / sum(weight) if normalize else total


def slerp(base: Array, other: Array, *, t: float) -> Array:
    """Return the point at `t` on the arc from `base` to `other`."""
    norms = [float(np.linalg.norm(x)) for x in (base, other)]
    over = [norm if norm > 1e-8 else 1.0 for norm in norms]
    cos = float(np.sum(base * other)) / (over[0] * over[1])
    if abs(cos) > 0.9995:
        return (1 - t) * base + t * other
    theta = acos(cos)
    return (sin((1 - t) * theta) * base + sin(t * theta) * other) / sin(theta)


def task_arithmetic(
    base: Array,
    deltas: Sequence[Array],
    *,
    weight: Sequence[float],
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Array:
    """Return the base plus the weighted sum of the deltas."""
    return base + lambda_ * join_deltas(deltas, weight=weight, consensus=False, normalize=normalize)


def ties(
    base: Array,
    deltas: Sequence[Array],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
) -> Array:
    """Trim each delta to its largest elements, elect signs, and add what agrees to the base."""
    masks = [find_largest(delta, share) for delta, share in zip(deltas, density, strict=True)]
    trimmed = sparsify(deltas, masks, rescale=rescale)
    return base + lambda_ * join_deltas(trimmed, weight=weight, consensus=True, normalize=normalize)


def dare_linear(
    base: Array,
    deltas: Sequence[Array],
    *,
    masks: Sequence[Bools],
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
) -> Array:
    """Drop what the masks say, rescale, and add the weighted sum to the base."""
    dropped = sparsify(deltas, masks, rescale=rescale)
    return base + lambda_ * join_deltas(dropped, weight=weight, consensus=False, normalize=normalize)


def dare_ties(
    base: Array,
    deltas: Sequence[Array],
    *,
    masks: Sequence[Bools],
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: bool = True,
) -> Array:
    """Drop what the masks say, rescale, elect signs, and add what agrees to the base."""
    dropped = sparsify(deltas, masks, rescale=rescale)
    return base + lambda_ * join_deltas(dropped, weight=weight, consensus=True, normalize=normalize)


def passthrough(tensor: Array, *, scale: float | None = None) -> Array:
    """Return the tensor, times `scale` where one is set."""
    return tensor if scale is None else tensor * scale


def sum_weighted(weight: Sequence[float], tensors: Sequence[Array]) -> Array:
    """Return the sum of ``weight[i] * tensors[i]``."""
    total = np.zeros_like(tensors[0])
    for factor, tensor in zip(weight, tensors, strict=True):
        total += factor * tensor
    return total


def find_largest(delta: Array, density: float) -> Bools:
    """Return where the max(1, ⌊density·n⌋) largest magnitudes are; of equal ones the first by index."""
    if density <= 0 or density >= 1:
        return np.full(delta.shape, density >= 1)
    kept = np.zeros(delta.size, bool)
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")
    kept[order[: max(1, floor(density * delta.size))]] = True
    return kept.reshape(delta.shape)


def sparsify(deltas: Sequence[Array], masks: Sequence[Bools], *, rescale: bool) -> list[Array]:
    """Return each delta where its mask is true, else 0; rescaled to the L1 norm that it had."""
    kept = [np.where(mask, delta, 0.0) for delta, mask in zip(deltas, masks, strict=True)]
    if not rescale:
        return kept
    return [left * find_rescale(delta, left) for delta, left in zip(deltas, kept, strict=True)]


def find_rescale(delta: Array, left: Array) -> float:
    """Return ‖delta‖₁ / ‖left‖₁, or 1 where either is under 1e-7."""
    before, after = float(np.abs(delta).sum()), float(np.abs(left).sum())
    return 1.0 if min(before, after) < 1e-7 else before / after


def join_deltas(deltas: Sequence[Array], *, weight: Sequence[float], consensus: bool, normalize: bool) -> Array:
    """Return the weighted sum of sparse deltas: of those with the elected sign, and normalised, if asked."""
    weighted = [factor * delta for factor, delta in zip(weight, deltas, strict=True)]
    if not consensus:
        divisor = sum(weight) if normalize else 1.0
        return sum_weighted(weight, deltas) / (divisor if abs(divisor) >= 1e-8 else 1.0)
    elected = np.where(np.sum(weighted, axis=0) >= 0, 1.0, -1.0)
    agrees = [np.sign(x) == elected for x in weighted]
    total = np.sum([np.where(yes, x, 0.0) for yes, x in zip(agrees, weighted, strict=True)], axis=0)
    if not normalize:
        return np.asarray(total)
    share = np.sum([np.where(yes, w, 0.0) for yes, w in zip(agrees, weight, strict=True)], axis=0)
    return np.asarray(total / np.where(abs(share) < 1e-8, 1.0, share))


# -------------------------------------------------------------------------------------------------- settings
def resolve(levels: Sequence[Level], parameter: str, *, name: str, t: float) -> Any:
    """Return the value for tensor `name` from the first level that gives one, or None."""
    for level in levels:
        if parameter in level and (value := evaluate(level[parameter], name=name, t=t)) is not None:
            return value
    return None


def evaluate(value: Any, *, name: str, t: float) -> Any:
    """Return what a setting says for tensor `name` at depth `t`; None where no condition matches.

    >>> evaluate([0, 10, 0], name="x", t=0.25), evaluate([True, False], name="x", t=0.9)
    (5.0, True)
    >>> evaluate([{"filter": "mlp", "value": 1}, {"value": [2, 3]}], name="a.attn", t=0.5)
    2.5
    """
    if not isinstance(value, list):
        return value
    if isinstance(value[0], Mapping):
        matching = (c["value"] for c in value if matches(c.get("filter"), name))
        return next((evaluate(v, name=name, t=t) for v in matching), None)
    place = t * (len(value) - 1)
    low = floor(place)
    if isinstance(value[0], bool | str):
        return value[low]
    return float(np.interp(place, range(len(value)), value))


def matches(pattern: str | None, name: str) -> bool:
    """Return whether a filter holds for the output tensor `name`."""
    if pattern in (None, "*"):
        return True
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else pattern in name


# ---------------------------------------------------------------------------------------------------- slices
@dataclass(frozen=True, slots=True)
class Source:
    """One model's part of a slice."""

    model: str
    first: int
    """The model's layer that becomes the slice's first."""
    count: int
    """Number of layers."""
    levels: tuple[Level, ...]
    """Settings, the most particular first."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive output layers made from the same sources."""

    sources: tuple[Source, ...]
    base: str | None
    levels: tuple[Level, ...]
    """Settings, the most particular first."""


def find_slices(recipe: Mapping[str, Any], load: Load) -> list[Slice]:
    """Return the slices of a recipe with `models`, `slices`, or the module `default` with one of them."""
    outer: tuple[Level, ...] = (recipe.get("parameters", {}),)
    stack: Mapping[str, Any] = recipe
    if "modules" in recipe:
        (stack,) = recipe["modules"].values()
        outer = (stack.get("parameters", {}), *outer)
    base = recipe.get("base_model")
    if "slices" in stack:
        return [make_slice(each, base, outer) for each in stack["slices"]]
    entries = list(stack["models"])
    if base is not None and all(entry["model"] != base for entry in entries):
        entries.append({"model": base})
    counts = {entry["model"]: count_layers(load(entry["model"])) for entry in entries}
    whole = [{**entry, "layer_range": [0, counts[entry["model"]]]} for entry in entries]
    return [make_slice({"sources": whole}, base, outer)]


def make_slice(given: Mapping[str, Any], base: str | None, outer: tuple[Level, ...]) -> Slice:
    """Return a recipe's slice, checked for equal numbers of layers."""
    levels = (given.get("parameters", {}), *outer)
    sources = tuple(
        Source(
            entry["model"],
            entry["layer_range"][0],
            entry["layer_range"][1] - entry["layer_range"][0],
            (entry.get("parameters", {}), *levels),
        )
        for entry in given["sources"]
    )
    if len({source.count for source in sources}) != 1:
        raise ValueError(f"sources of one slice differ in layers: {[s.count for s in sources]}")
    return Slice(sources, given.get("base_model", base), levels)


def count_layers(tensors: Mapping[str, Array]) -> int:
    """Return the number of layers that the names show."""
    return 1 + max(int(found["i"]) for name in tensors if (found := LAYER.fullmatch(name)))


# ----------------------------------------------------------------------------------------------------- merge
@dataclass(frozen=True, slots=True)
class Piece:
    """One input of one output tensor."""

    source: Source
    values: Array


def expected(
    recipe: Mapping[str, Any],
    load: Load,
    *,
    mask: Mask | None = None,
    delta_dtype: npt.DTypeLike = np.float32,
) -> dict[str, Array]:
    """Return every tensor of the merge, float64.

    load: a model, as the recipe writes it, to its tensors. mask: for the random methods.
    delta_dtype: deltas are rounded to it (as the engine computes them), so that both rank the same values;
    float64 where an input is stored so.
    """
    merged: dict[str, Array] = {}
    for name, at, t, pieces in iterate_outputs(find_slices(recipe, load), load):
        values = merge_tensor(recipe["merge_method"], name, at, pieces, t, mask, np.dtype(delta_dtype))
        merged[name] = np.asarray(values)
    return merged


def iterate_outputs(slices: Sequence[Slice], load: Load) -> Iterator[tuple[str, Slice, float, list[Piece]]]:
    """Yield each output tensor: name, slice, depth of gradients, and its inputs."""
    start = 0
    for at in slices:
        count = at.sources[0].count
        for i in range(count):
            t = i / (count - 1) if count > 1 else 1.0
            for name, pieces in collect_layer(at, i, start + i, load).items():
                yield name, at, t, pieces
        start += count
    models = {source.model for at in slices for source in at.sources}
    outside = list(dict.fromkeys(name for model in models for name in load(model) if not LAYER.match(name)))
    for name in outside:
        at = slices[0] if "embed" in name else slices[-1]
        found = [Piece(s, read_outside(load(s.model), name)) for s in at.sources if holds(load(s.model), name)]
        if found:
            yield name, at, 0.0, found


def collect_layer(at: Slice, i: int, out: int, load: Load) -> dict[str, list[Piece]]:
    """Return the inputs of the slice's layer `i` by the names they get as the output's layer `out`."""
    collected: dict[str, list[Piece]] = {}
    for source in at.sources:
        for name, values in load(source.model).items():
            found = LAYER.fullmatch(name)
            if found and int(found["i"]) == source.first + i:
                renamed = f"{found['stack']}{out}{found['rest']}"
                collected.setdefault(renamed, []).append(Piece(source, values))
    return collected


def holds(tensors: Mapping[str, Array], name: str) -> bool:
    """Return whether a model has the tensor, or is tied and has it as its embedding."""
    return name in tensors or name == HEAD


def read_outside(tensors: Mapping[str, Array], name: str) -> Array:
    """Return a tensor outside the layers; a tied model's head is its embedding."""
    return tensors[name] if name in tensors else tensors[EMBEDDING]


def merge_tensor(
    method: str,
    name: str,
    at: Slice,
    pieces: Sequence[Piece],
    t: float,
    mask: Mask | None,
    delta_dtype: np.dtype[Any],
) -> Array:
    """Return one output tensor."""

    def one(parameter: str, default: Any = None) -> Any:
        value = resolve(at.levels, parameter, name=name, t=t)
        return require(default if value is None else value, parameter, name)

    def each(parameter: str, default: Any = None) -> list[float]:
        found = [resolve(piece.source.levels, parameter, name=name, t=t) for piece in others]
        return [float(require(default if v is None else v, parameter, name)) for v in found]

    others = list(pieces)
    if method == "linear":
        values = [piece.values for piece in pieces]
        return linear(values, weight=each("weight"), normalize=one("normalize", True))
    if method == "passthrough":
        (piece,) = pieces
        return passthrough(piece.values, scale=resolve(piece.source.levels, "scale", name=name, t=t))
    base = take_base(others, at.base, name)
    if method == "slerp":
        (other,) = others
        return slerp(base.values, other.values, t=one("t"))
    if method not in DELTA_METHODS:
        raise ValueError(f"the oracle does not know {method!r}")
    start = base.values.astype(delta_dtype)
    deltas = [(piece.values.astype(delta_dtype) - start).astype(np.float64) for piece in others]
    weight, lambda_ = each("weight"), one("lambda", 1.0)
    if method == "task_arithmetic":
        normalize = one("normalize", False)
        return task_arithmetic(base.values, deltas, weight=weight, lambda_=lambda_, normalize=normalize)
    density = each("density", 1.0)
    if method == "ties":
        return ties(
            base.values,
            deltas,
            weight=weight,
            density=density,
            normalize=one("normalize", True),
            lambda_=lambda_,
            rescale=one("rescale", False),
        )
    if mask is None:
        raise ValueError(f"{method} needs a mask")
    dare = dare_ties if method == "dare_ties" else dare_linear
    return dare(
        base.values,
        deltas,
        masks=[draw_mask(mask, name, p, share) for p, share in zip(others, density, strict=True)],
        weight=weight,
        normalize=one("normalize", False),
        lambda_=lambda_,
        rescale=one("rescale", True),
    )


def draw_mask(mask: Mask, name: str, piece: Piece, density: float) -> Bools:
    """Return which elements of one model's delta stay."""
    shape = piece.values.shape
    if density <= 0 or density >= 1:
        return np.full(shape, density >= 1)
    return mask(name, piece.source.model, shape, density)


def take_base(pieces: list[Piece], base: str | None, name: str) -> Piece:
    """Remove the base from `pieces` and return it."""
    for i, piece in enumerate(pieces):
        if piece.source.model == base:
            return pieces.pop(i)
    raise ValueError(f"{name}: the base {base!r} is not among the sources")


def require(value: Any, parameter: str, name: str) -> Any:
    """Return `value`, or raise where it is None."""
    if value is None:
        raise ValueError(f"{name}: {parameter} has no value")
    return value

"""Which merge method when: a page made of what the methods say of themselves, so that it cannot go stale."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergemill.engine.methods import Coefficients, Method, Step

HEAD = """# Which method when

Made by `mergemill methods --guide` from the methods' own files; `mergemill methods NAME` says more of one, and with
`--model PATH` what it takes for a model of yours.

Begin with `linear` where there is no common base, and with `task_arithmetic` where there is one: they read everything
once, have the most evidence, and show what another method must beat. Then ask what goes wrong. Do signs disagree, are
task vectors redundant, or does each live in few weights: a method that looks at elements. Are there many tasks of one
base: one on matrices. Try two or three, and evaluate what comes out: no method is best everywhere, and what was seen
on vision models alone says little of LLMs.

**Evidence** is what the sources say that they measured, and independent comparisons where there are any; none of it was
measured by us. **Reads** is how often the inputs are read where they do not fit into `--memory`; where they fit, once.
**In memory** is what a task holds at once: blocks of elements (any model merges in the smallest `--memory`), whole
rows, or whole matrices; of these so many copies in float64, which for a matrix of 4096 × 14336 are given in GiB.
"""
GROUPS: "Mapping[str, Callable[[Method], bool]]" = {
    "No base, or one that may be left out": lambda method: method.base in ("none", "optional"),
    "Task vectors, or a base and a model: elements and rows, streamed": lambda method: method.reads != "matrix",
    "Task vectors: whole matrices": lambda method: True,
}
MODELS = 3  # of which the memory of whole matrices is told
LARGE = 4096 * 14336  # elements: the largest matrix of a layer of an 8B model


def make_guide(methods: "Sequence[Method]", steps: "Mapping[str, tuple[str, Coefficients | Step]]") -> str:
    """Return the page, Markdown."""
    left, parts = list(methods), [HEAD]
    for title, belongs in GROUPS.items():
        group = [method for method in left if belongs(method)]
        left = [method for method in left if method not in group]
        rows = (
            (f"`{each.name}`", each.purpose, describe_inputs(each), _say_reads(each), _say_memory(each), each.evidence)
            for each in group
        )
        parts.append(_table(title, ("method", "for", "models", "reads", "in memory", "evidence"), rows))
    around = (
        (f"`{name}`", {"post": "`post`", "coefficients": "`coefficients`"}[key], step.purpose, step.evidence)
        for name, (key, step) in steps.items()
    )
    parts.append(_table("Around a method", ("name", "key", "for", "evidence"), around))
    return "\n".join(parts)


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(_lines(title, heads, rows)) + "\n"


def _lines(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from (f"## {title}", "")
    for cells in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(cell or 'nothing is said' for cell in cells)} |"


def _say_reads(method: "Method") -> str:
    return "once" if not method.most_rounds else f"{method.usual_rounds + 1} times, {method.most_rounds + 1} at most"


def _say_memory(method: "Method") -> str:
    if method.reads != "matrix":
        return "whole rows" if method.grain == "row" else "blocks"
    copies = method.extra_slabs + method.extra_slabs_each * (MODELS + 1)
    return f"{copies} copies for {MODELS} models, {copies * LARGE * 8 / 2**30:.1f} GiB"


def describe_inputs(method: "Method") -> str:
    """Say how many models a method takes, and whether one of them is the base."""
    least, most = method.least_inputs, method.most_inputs
    models = f"{least}" if least == most else f"{least} to {most}" if most else f"{least} or more"
    base = {
        "none": "",
        "optional": ", with or without a base",
        "required": " and a base",
        "first of two": ", one the base",
    }
    return models + base[method.base]

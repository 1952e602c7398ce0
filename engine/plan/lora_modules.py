"""Which of a model's tensors an adapter can hold, and how peft calls them.

What a module is, its tensors' names and shapes must say (decided 2026-11-29: no library is asked, so that any model
works): a matrix is a linear layer, unless its name is that of an embedding; a weight of more axes is a convolution; an
expert's packed weights have no ``.weight``. A router beside experts is no linear layer of torch's, so it is stored
whole, as norms are.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from mergemill.engine.checkpoint.family import Family, is_packed_otherwise
from mergemill.engine.errors import PlanError
from mergemill.engine.tensors.cuts import Shape

Kind = Literal["linear", "embedding", "convolution", "experts", "whole", "bias", "parameter"]

MATRICES: tuple[Kind, ...] = ("linear", "embedding", "convolution", "experts")
_EMBEDDING = re.compile(
    r"(?:^|_)(?:embed|embeds|emb|embedding|embeddings)(?:_(?:tokens|positions|in|tokens_per_layer))?$|^(?:wte|wpe|shared)$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection|head)$")
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
_ROUTERS = ("gate", "router")
_NO_MATRIX = Shape(0, 0)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model as one that an adapter may change."""

    name: str
    module: str  # the path of its module
    kind: Kind
    tensor_shape: tuple[int, ...]
    count: int = 1  # of matrices
    shape: Shape = _NO_MATRIX  # of each
    turned: bool = False  # stored [in, out], or a row a token

    @property
    def is_matrix(self) -> bool:
        """Whether it can be decomposed."""
        return self.kind in MATRICES

    @property
    def is_vocabulary(self) -> bool:
        """Whether it is an embedding or a head."""
        return self.kind == "embedding" or _HEAD.search(self.module) is not None

    @property
    def is_packed(self) -> bool:
        """Whether it is a parameter of a module that peft knows by its name alone (`target_parameters`)."""
        return self.kind == "experts"

    @property
    def is_one_expert(self) -> bool:
        """Whether it is of an expert that is stored by itself, which transformers and peft pack: ranks are alike."""
        return _ONE_EXPERT.search(self.module) is not None

    def name_factor(self, side: str, depth: int) -> str:
        """Return what peft calls one of the factors; depth: how many parameters of the module stand around it."""
        base = f"base_model.model.{self.module}{'.base_layer' * depth}"
        return f"{base}.lora_embedding_{side}" if self.kind == "embedding" else f"{base}.lora_{side}.weight"

    def shape_factor(self, side: str, rank: int) -> tuple[int, ...]:
        """Return the shape of one of the factors."""
        if self.kind == "convolution":
            into, kernel = self.tensor_shape[1], self.tensor_shape[2:]
            return (rank, into, *kernel) if side == "A" else (self.shape.rows, rank, *(1 for _ in kernel))
        into, out = self.shape if self.turned else (self.shape.columns, self.shape.rows)
        return (self.count * rank, into) if side == "A" else (out, rank * self.count)


def sort_weight(name: str, shape: tuple[int, ...], names: Collection[str], family: Family) -> Weight:
    """Return what the tensor of this name and shape is; `names` are all of the model's."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return Weight(name, module, "bias", shape)
    if leaf != "weight":
        if module.rpartition(".")[2] == "experts" and len(shape) in (2, 3):
            turned = len(shape) == 3 and is_packed_otherwise(name, family)
            count = shape[0] if len(shape) == 3 else 1
            return Weight(name, module, "experts", shape, count, Shape(*shape[-2:]), turned)
        return Weight(name, module, "parameter", shape)
    parent, _, last = module.rpartition(".")
    routes = last in _ROUTERS and _has_experts(parent, names, family)
    if len(shape) == 2 and not routes:
        if _EMBEDDING.search(last) and not _HEAD.search(module):
            return Weight(name, module, "embedding", shape, 1, Shape(*shape), turned=True)
        turned = any(fnmatchcase(name, pattern) for pattern in family.transposed)
        return Weight(name, module, "linear", shape, 1, Shape(*shape), turned)
    if len(shape) in (3, 4, 5) and shape[1] > 1:
        return Weight(name, module, "convolution", shape, 1, Shape(shape[0], math.prod(shape[1:])))
    return Weight(name, module, "whole", shape)


def _has_experts(block: str, names: Collection[str], family: Family) -> bool:
    """Whether a block has experts, in any of the family's spellings of it."""
    blocks = {f"{block}.".replace(new, old) for old, new in ((".", "."), *family.spellings)}
    beginnings = tuple(f"{each}experts." for each in blocks)
    return any(each.startswith(beginnings) for each in names)


def find_depth(weight: Weight, cut: Iterable[Weight]) -> int:
    """Return how many of a module's parameters peft wraps around this one: those that the module declares after it.

    Headers do not say the order; transformers' mixtures declare what goes into an expert before what comes out of it.
    """
    if not weight.is_packed:
        return 0
    own = _order_parameter(weight)
    return sum(each.is_packed and each.module == weight.module and _order_parameter(each) > own for each in cut)


def _order_parameter(weight: Weight) -> tuple[bool, str]:
    leaf = weight.name.rpartition(".")[2]
    return "down" in leaf, leaf


def list_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return the paths of all modules that tensors of these names are in.

    >>> list_modules(["model.h.0.mlp.weight", "norm.weight"])
    ('model', 'model.h', 'model.h.0', 'model.h.0.mlp', 'norm')
    """
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[:count]): None for count in range(1, len(parts) + 1)}
    return tuple(found)


def matches_target(module: str, target: str) -> bool:
    """Whether peft takes a module for one that `target_modules` names."""
    return f".{module}".endswith(f".{target}")


def matches_saved(module: str, saved: str) -> bool:
    """Whether peft takes a module for one that `modules_to_save` names: it asks for the end of the text alone.

    >>> matches_saved("model.layers.0.input_layernorm", "norm"), matches_target("model.layernorm", "norm")
    (True, False)
    """
    return module.endswith(saved)


def name_exactly(
    chosen: Sequence[str], known: Collection[str], matches: Callable[[str, str], bool], what: str
) -> list[str]:
    """Return names that mean the `chosen` of all `known` modules and no others: last names where these do, or paths.

    >>> known = ["h.0.q", "h.1.q", "h.0.v", "h.1.v"]
    >>> name_exactly(["h.0.q", "h.1.q", "h.1.v"], known, matches_target, "target_modules")
    ['q', 'h.1.v']
    """
    wanted, found = frozenset(chosen), dict[str, None]()
    meant: dict[str, list[str]] = {}
    for module in chosen:
        last = module.rpartition(".")[2]
        if last not in meant:
            meant[last] = [each for each in known if matches(each, last)]
        short = last if wanted.issuperset(meant[last]) else module
        if short == module and (wrong := next((m for m in known if matches(m, module) and m not in wanted), None)):
            raise PlanError(
                f"{module}: peft's {what} cannot name it without {wrong}, which is not to be in the adapter; "
                f"have both, or leave it out with -e"
            )
        found[short] = None
    return list(found)


def find_patterns(values: dict[str, int], usual: int) -> dict[str, int]:
    """Return peft's `rank_pattern` for modules whose rank is not the usual one, so that each key means its own alone.

    The first key that matches counts, so longer ones come first, and a module of the usual rank has a key of its own
    where another's would mean it too.
    """
    keys = {module: rank for module, rank in values.items() if rank != usual}
    shadowed = {m: r for m, r in values.items() if r == usual and any(m.endswith(f".{key}") for key in keys)}
    joined = {**keys, **shadowed}
    return {module: joined[module] for module in sorted(joined, key=lambda each: (-len(each), each))}

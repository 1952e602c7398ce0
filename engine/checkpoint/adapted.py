"""A model with adapters: what is stored of both as one checkpoint, and what the adapters change in it.

What an adapter stores instead of a tensor of the model stands in its place. Its factors are further tensors beside the
model's, and `Change`s say what they do; expressions are made of those in `offers/adapters.py`. All of it is known from
headers, so what does not go together is refused here, by the adapter's own names.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mergemill.engine.checkpoint.adapter import Adapter
from mergemill.engine.checkpoint.adapter_config import PLAIN_LORA
from mergemill.engine.checkpoint.adapter_names import find_prefixes, find_spellings
from mergemill.engine.checkpoint.changes import Change, Product, Replacement, Residual, Shift
from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import says_tied
from mergemill.engine.checkpoint.copied_files import TEMPLATE_FILES, TOKENIZER_FILES, matches
from mergemill.engine.checkpoint.family import Family, choose_family, find_tie, is_vocabulary, spell
from mergemill.engine.checkpoint.packed_experts import PackedFactors, count_experts, find_parameter, make_packed
from mergemill.engine.checkpoint.unpacked import pack_again, unpack_experts
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.json"
_NOT_PLAIN = ("magnitude", "tokens")


@dataclass(frozen=True, slots=True)
class _Adding:
    """One adapter on its way into a model."""

    model: Checkpoint
    adapter: Adapter
    prefixes: tuple[str, str]  # what its names of modules begin with, and what the model's begin with instead
    spelt: Mapping[str, str]  # the model's modules that it spells otherwise, by the spelling that stands for all
    family: Family
    weight: float
    number: int

    def rename(self, name: str) -> str:
        """Return what the model calls a module or tensor of the adapter's."""
        head, tail = spell(f"{self.prefixes[1]}{name.removeprefix(self.prefixes[0])}.", self.family)[:-1], ""
        while head:
            if head in self.spelt:
                return self.spelt[head] + tail
            head, dot, last = head.rpartition(".")
            tail = f"{dot}{last}{tail}"
        return tail

    def fail(self, stored: StoredTensor, why: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.ref}: tensor {stored.name}: {why}")

    def find(self, name: str, stored: StoredTensor) -> StoredTensor:
        """Return the model's tensor of this name, which `stored` changes."""
        if name not in self.model.tensors:
            raise self.fail(stored, f"{self.model.ref} has no tensor {name} that it could change")
        return self.model.tensors[name]

    def keep(self, module: str, part: str) -> str:
        """Return the name under which a part of a module stands beside the model's tensors."""
        return f"{self.rename(module)}.adapter{self.number}_{part}"


def add_adapters(model: Checkpoint, adapters: Sequence[tuple[Adapter, float]], ref: str) -> Checkpoint:
    """Return the model with the changes of adapters, each taken so many times, under the name `ref`."""
    family = choose_family(model.config)
    unpacked = unpack_experts(model, [adapter for adapter, _ in adapters], family)
    model, plain = unpacked.model, unpacked.model.tensors
    for number, (given, weight) in enumerate(adapters, 1):
        adapter = _leave_out_tied(given, plain, family)
        adding = _Adding(
            model, adapter, find_prefixes(adapter, plain), find_spellings(plain, family), family, weight, number
        )
        if weight != 1.0 or len(adapters) > 1:
            _check_plain(adding)
        model = _take_tokenizer(_add(adding), adapter)
    model = pack_again(model, unpacked, ref)
    return replace(model, ref=ref, tensors=dict(sorted(model.tensors.items())))


def _leave_out_tied(adapter: Adapter, names: Collection[str], family: Family) -> Adapter:
    """Return the adapter without its copies for what is tied to an embedding, of which the model stores nothing."""
    if not adapter.config.ties:
        return adapter

    def is_tied(name: str) -> bool:
        return name not in names and find_tie(name, names, family) is not None

    parts = {module: each for module, each in adapter.parts.items() if not is_tied(f"{module}.weight")}
    return replace(adapter, parts=parts, whole={n: each for n, each in adapter.whole.items() if not is_tied(n)})


def _take_tokenizer(model: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the model with the adapter's tokenizer, where that has one: new tokens are trained with an adapter."""
    if TOKENIZER_NAME not in adapter.files:
        return model
    patterns = (*TOKENIZER_FILES, *TEMPLATE_FILES)
    kept = {name: pin for name, pin in model.pins.items() if not matches(name, patterns)}
    own = {name: pin for name, pin in adapter.files.items() if matches(name, patterns)}
    return replace(model, pins=dict(sorted((kept | own).items())))


def _is_resized(name: str, found: StoredTensor, stored: StoredTensor, adding: _Adding) -> bool:
    """Whether a tensor stands for one with a row a token, and counts another vocabulary, which the adapter brings."""
    own = TOKENIZER_NAME in adding.adapter.files and is_vocabulary(name, adding.family)
    return own and found.shape[1:] == stored.shape[1:]


def _add(adding: _Adding) -> Checkpoint:
    model, adapter = adding.model, adding.adapter
    whole = {adding.rename(name): (name, stored) for name, stored in adapter.whole.items()}
    for name, (_, stored) in whole.items():
        tie = find_tie(name, model.tensors, adding.family) if name not in model.tensors else None
        found = adding.find(tie or name, stored)
        if found.shape != stored.shape and not _is_resized(name, found, stored, adding):
            raise adding.fail(
                stored,
                f"stands for {name} and has shape {list(stored.shape)}, not {list(found.shape)}; an adapter of "
                f"another vocabulary needs its tokenizer.json beside it",
            )
    tensors = {**model.tensors, **{name: stored._replace(name=name) for name, (_, stored) in whole.items()}}
    adding = replace(adding, model=replace(model, tensors=tensors))
    changes: list[Change] = []
    beside: dict[str, StoredTensor] = {}
    for module, parts in adapter.parts.items():
        changes += _make_changes(adding, module, parts)
        beside |= {(name := adding.keep(module, part)): stored._replace(name=name) for part, stored in parts.items()}
    return replace(model, tensors={**tensors, **beside}, changes=(*model.changes, *changes))


def _make_changes(adding: _Adding, module: str, parts: Mapping[str, StoredTensor]) -> Iterator[Change]:
    if parameter := find_parameter(adding.adapter, module):
        yield from _make_packed(adding, module, parameter, parts)
        return
    for kind in ("", "embedding_"):
        both = [parts.get(f"{kind}{letter}") for letter in "AB"]
        half = next((each for each in both if each is not None), None)
        if half is not None and None in both:
            raise adding.fail(half, "is half of a pair; the other factor is not there")
        if half is not None:
            product = _make_product(adding, module, parts, kind)
            yield from _take_out(adding, product, half, embedding=bool(kind))
            yield product
    if "bias" in parts:
        yield _make_shift(adding, module, parts)
    if "tokens" in parts:
        yield _make_replacement(adding, module, parts["tokens"])


def _make_product(adding: _Adding, module: str, parts: Mapping[str, StoredTensor], kind: str) -> Product:
    config, name = adding.adapter.config, f"{adding.rename(module)}.weight"
    a, b, magnitude = parts[f"{kind}A"], parts[f"{kind}B"], parts.get("magnitude")
    weight, rank = adding.find(name, a), config.find_rank(module)
    transposed = bool(kind) or _is_transposed(name, adding)
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    if a.shape[0] != rank:
        raise adding.fail(a, f"has {a.shape[0]} rows, and by its config the rank is {rank}")
    sides = (rows, columns) if transposed else (columns, rows)
    for factor, size in ((a, sides[0] * rank), (b, sides[1] * rank)):
        if math.prod(factor.shape) != size or (factor is b and b.shape[:2] != (sides[1], rank)):
            way = "stored transposed" if transposed else "stored as it is"
            raise adding.fail(
                factor, f"has shape {list(factor.shape)}, which does not fit {name} {list(weight.shape)}, {way}"
            )
    if (magnitude is not None) != config.has_magnitudes:
        lacks = "has no magnitude beside it" if magnitude is None else "is a magnitude"
        raise adding.fail(
            magnitude or a, f"{lacks}, and use_dora is {str(config.has_magnitudes).lower()} in its config"
        )
    if magnitude is not None and math.prod(magnitude.shape) != sides[1]:
        raise adding.fail(magnitude, f"has shape {list(magnitude.shape)}, and {name} {list(weight.shape)}")
    left, right = ("A", "B") if transposed else ("B", "A")
    return Product(
        tensor=name,
        left=adding.keep(module, f"{kind}{left}"),
        right=adding.keep(module, f"{kind}{right}"),
        magnitude=None if magnitude is None else adding.keep(module, "magnitude"),
        rank=rank,
        scale=config.find_scale(module) * adding.weight,
        transposed=transposed,
        rows=rows,
        columns=columns,
    )


def _take_out(adding: _Adding, product: Product, half: StoredTensor, *, embedding: bool) -> Iterator[Residual]:
    """Yield what peft takes out of a weight before it adds the product; it does so for linear layers alone."""
    beginning, name = adding.adapter.config.beginning, product.tensor
    if beginning is None:
        return
    shape, stored = adding.find(name, half).shape, any(adding.rename(each) == name for each in adding.adapter.whole)
    tied = says_tied(adding.model.config) and find_tie(name, adding.model.tensors, adding.family) is not None
    why = ""
    if embedding or len(shape) != 2:
        why = "of an embedding or a kernel, of which peft loads none"
    elif tied:  # also where what was left of the head is stored, since the embedding's is not
        why = f"of {name}, which is tied: peft would take it out of the embedding too"
    elif stored:  # as peft stores what a head's factors were taken out of: what was left
        return
    elif beginning == "olora" and product.transposed:
        why = f"of {name}, which is stored transposed: peft takes its factors from the wrong side"
    elif product.rank > min(shape):
        why = f"of rank {product.rank}, and {name} {list(shape)} has no more than {min(shape)}"
    if why:
        raise adding.fail(half, f"init_lora_weights is {beginning!r}, and it is {why}; {PLAIN_LORA}")
    yield Residual(name, beginning, product.rank, 1.0 if beginning == "pissa" else product.scale)


def _make_packed(adding: _Adding, module: str, parameter: str, parts: Mapping[str, StoredTensor]) -> Iterator[Change]:
    a, b = parts.get("A"), parts.get("B")
    half = a or b or next(iter(parts.values()))
    if adding.adapter.config.beginning is not None:
        raise adding.fail(half, f"init_lora_weights is no way to begin with packed experts; {PLAIN_LORA}")
    if a is None or b is None or len(parts) > 2:
        raise adding.fail(half, f"is of the parameter {parameter}, which needs a pair of factors and nothing else")
    rank = adding.adapter.config.find_rank(parameter)
    count, target = count_experts(a.shape[0], rank), adding.rename(parameter)
    if not count or b.shape[1:] != (rank * count,):
        raise adding.fail(
            a, f"has shape {list(a.shape)}, its other half {list(b.shape)}, and by its config the rank is {rank}"
        )
    scale = adding.adapter.config.find_scale(parameter) * adding.weight
    given = PackedFactors(
        parameter, adding.keep(module, "B"), adding.keep(module, "A"), rank, scale, count, a.shape[1], b.shape[0]
    )
    shape = adding.model.tensors[target].shape if target in adding.model.tensors else ()
    changes = list(make_packed(given, target, adding.model.tensors, shape, adding.family))
    if not changes:
        raise adding.fail(a, f"{adding.model.ref} has no tensor {target}, packed or of single experts")
    for change in changes:
        found = adding.find(change.tensor, a)
        if math.prod(found.shape) != change.rows * change.columns * (count if change.tensor == target else 1):
            raise adding.fail(
                a,
                f"has shape {list(a.shape)}, its other half {list(b.shape)}, which do not fit {change.tensor} "
                f"{list(found.shape)}",
            )
    yield from changes


def _make_shift(adding: _Adding, module: str, parts: Mapping[str, StoredTensor]) -> Change:
    added, name = parts["bias"], f"{adding.rename(module)}.bias"
    if "B" not in parts:
        raise adding.fail(added, "has no factors beside it")
    if adding.find(name, added).shape != added.shape:
        raise adding.fail(added, f"has shape {list(added.shape)}, and {name} {list(adding.find(name, added).shape)}")
    scale = adding.adapter.config.find_scale(module) * adding.weight
    return Shift(name, adding.keep(module, "bias"), scale)


def _make_replacement(adding: _Adding, module: str, rows: StoredTensor) -> Change:
    name, tokens = f"{adding.rename(module)}.weight", adding.adapter.config.find_tokens(module)
    weight = adding.find(name, rows)
    if tokens is None:
        raise adding.fail(rows, "is of tokens that its config does not name (trainable_token_indices)")
    if rows.shape != (len(tokens), *weight.shape[1:]):
        raise adding.fail(
            rows, f"has shape {list(rows.shape)}, for {len(tokens)} tokens of {name} {list(weight.shape)}"
        )
    if max(tokens, default=0) >= weight.shape[0] or len(set(tokens)) < len(tokens):
        raise adding.fail(rows, f"is of tokens that {name} {list(weight.shape)} does not have, or has each once")
    return Replacement(name, adding.keep(module, "tokens"), tokens)


def _is_transposed(name: str, adding: _Adding) -> bool:
    """Whether a weight is stored [in, out]: as its family says, else as the adapter's config does; never by shapes."""
    if adding.family.transposed:
        return any(fnmatchcase(name, pattern) for pattern in adding.family.transposed)
    return adding.adapter.config.transposed


def _check_plain(adding: _Adding) -> None:
    """Refuse what cannot be taken so many times, or beside another: nothing but plain products adds up."""
    adapter = adding.adapter
    if beginning := adapter.config.beginning:
        raise CheckpointError(
            f"{adapter.ref}: init_lora_weights is {beginning!r}, and such does not add up: of several adapters, or one "
            f"with a weight, each must be plain LoRA; {PLAIN_LORA}"
        )
    other = next(iter(adapter.whole.values()), None)
    parts = [stored for of_one in adapter.parts.values() for part, stored in of_one.items() if part in _NOT_PLAIN]
    if found := [*parts, *([other] if other is not None else [])]:
        raise adding.fail(
            found[0], "does not add up: of several adapters, or one with a weight, each must be plain LoRA"
        )

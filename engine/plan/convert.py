"""Converting a model: the same tensors in another dtype, quantised or no more quantised, streamed as a merge is.

Every tensor keeps its name; config, tokenizer, card and licence go along. An adapter that is written behind the model
(``model+adapter``) is merged in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemill.engine.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from mergemill.engine.checkpoint.config import CONFIG_DTYPES, REMOVED, Changes, dtype_changes, make_config
from mergemill.engine.checkpoint.copied_files import copied_files
from mergemill.engine.checkpoint.family import Family, choose_family
from mergemill.engine.checkpoint.needed import find_needed
from mergemill.engine.checkpoint.quantized import QUANTIZATION_FILES, find_keys
from mergemill.engine.checkpoint.terms import CARD_NAME
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.adapters import apply_adapters, open_adapters
from mergemill.engine.plan.coverage import Ledger
from mergemill.engine.plan.draft import SHARD_SIZE, Draft, finish
from mergemill.engine.plan.gguf import GGUF_DTYPES, write_gguf
from mergemill.engine.plan.inputs import check_input, warn_of_activations, warn_of_dequantized
from mergemill.engine.plan.opening import check_kinds, open_models
from mergemill.engine.plan.quantize import SCHEMES, quantize
from mergemill.engine.plan.small_files import copy_file, find_main_dtype
from mergemill.engine.plan.spellings import read_paths
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SmallFile
from mergemill.engine.recipe import Recipe, parse_reference
from mergemill.engine.recipe.stages import list_models
from mergemill.engine.storage.store import make_storage
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, TORCH_DTYPES, is_mergeable

_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")  # how files begin that go with the weights


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model that is open, and what is offered of it."""

    name: str  # as it was given
    checkpoint: Checkpoint
    family: Family
    offers: Offers
    told: tuple[str, ...]  # warnings


def make_convert_plan(
    model: str,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    gguf: str | None = None,
    shard_size: str | int = SHARD_SIZE,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Plan the conversion of `model`, written as in a recipe.

    dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``, of all floating tensors, or of those that are not
    quantised. quantize: ``fp8_block`` or ``mxfp4``. gguf: the name of a file of llama.cpp's, which is written instead
    of safetensors: as dtype says, or with ``q8_0``. shard_size and storage are those of `make_plan`. Raises
    `InputError`.
    """
    given = {"model": model, "dtype": dtype, "quantize": quantize, "gguf": gguf}
    _check(dtype, quantize, gguf)
    opened = open_model(model, storage)
    return finish(_draft(opened, {key: value for key, value in given.items() if value is not None}), shard_size)


def _check(dtype: str | None, scheme: str | None, gguf: str | None) -> None:
    if gguf is not None:
        _check_gguf(dtype, scheme, gguf)
        return
    if dtype is None and scheme is None:
        raise PlanError("convert: say what to: a dtype, or how to quantize")
    if dtype is not None and dtype not in RECIPE_DTYPES:
        raise PlanError(f"convert: dtype {dtype!r} is unknown; known are {', '.join(RECIPE_DTYPES)}")
    if scheme is not None and scheme not in SCHEMES:
        raise PlanError(f"convert: quantize {scheme!r} is unknown; known are {', '.join(SCHEMES)}")


def _check_gguf(dtype: str | None, scheme: str | None, gguf: str) -> None:
    if not gguf.endswith(".gguf") or "/" in gguf:
        raise PlanError(f"convert: {gguf!r} is no name of a GGUF file; write model.gguf")
    if scheme not in (None, "q8_0"):
        raise PlanError(f"convert: quantize {scheme!r} is not written as GGUF; q8_0 is")
    if dtype is not None and (scheme is not None or RECIPE_DTYPES.get(dtype) not in GGUF_DTYPES):
        known = ", ".join(name for name, each in RECIPE_DTYPES.items() if each in GGUF_DTYPES)
        raise PlanError(
            f"convert: dtype {dtype!r} is not written as GGUF beside {scheme or 'nothing'}; {known} or q8_0 are"
        )


def open_model(model: str, storage: Mapping[str, Mapping[str, Any]] | None, where: str = "convert") -> ModelInput:
    """Open a model, with its adapter where it is given one, and find what it offers."""
    recipe = Recipe.model_validate({"merge_method": "passthrough", "models": [{"model": parse_reference(model)}]})
    recipe = read_paths(recipe, list_models(recipe), where=where)
    refs, reached = list_models(recipe), make_storage(storage)
    checkpoints = apply_adapters(refs, open_models(refs, reached, {}, where), open_adapters(refs, reached))
    check_kinds(checkpoints, where)
    ((name, checkpoint),) = checkpoints.items()
    family = choose_family(checkpoint.config)
    offers = open_offers(checkpoints, family, {})
    check_input(checkpoint, offers[name], family, where)
    unknown = next((tensor for tensor, offer in offers[name].items() if offer.dtype not in TORCH_DTYPES), None)
    if unknown is not None:
        raise PlanError(
            f"{where}: {name}: tensor {unknown} is stored as {offers[name][unknown].dtype}, which is kept "
            f"by no conversion yet"
        )
    told = (
        *checkpoint.left_out,
        *warn_of_dequantized(checkpoints, offers, where=where),
        *warn_of_activations(checkpoints, offers, where=where),
    )
    return ModelInput(name, checkpoint, family, offers[name], told)


def count_uses(opened: ModelInput) -> Ledger:
    """Return a ledger in which all that is offered is copied."""
    ledger = Ledger()
    for offer in opened.offers.values():
        for name in offer.uses:
            ledger.use(opened.name, name, "copied")
    return ledger


def _draft(opened: ModelInput, value: Mapping[str, Any]) -> Draft:
    dtype = RECIPE_DTYPES[value["dtype"]] if "dtype" in value else None
    if "gguf" in value:
        return _draft_gguf(opened, value)
    plain = [
        OutputTensor(name, dtype if dtype and is_mergeable(offer.dtype) else offer.dtype, offer.expression)
        for name, offer in opened.offers.items()
    ]
    made = quantize(plain, value.get("quantize"), opened.checkpoint, opened.family, where="convert")
    return Draft(
        origin=Origin("convert", f"convert to {value.get('quantize') or value['dtype']}", value),
        tensors=made.tensors,
        files=_make_files(opened.checkpoint, plain, made.changes),
        sources=count_uses(opened).summarise({opened.name: opened.checkpoint}),
        donor=f"{opened.name}, the model",
        dtype_from="as asked",
        warnings=opened.told,
    )


def _draft_gguf(opened: ModelInput, value: Mapping[str, Any]) -> Draft:
    """Return the draft of a GGUF file; its matrices are as asked, else as most of the model is."""
    stored = [OutputTensor(name, offer.dtype, offer.expression) for name, offer in opened.offers.items()]
    most = find_main_dtype(stored)
    coding = value.get("quantize") or RECIPE_DTYPES.get(value.get("dtype", ""), most if most in GGUF_DTYPES else "F32")
    draft = Draft(
        origin=Origin("convert", f"convert to GGUF {coding.upper()}", value),
        tensors=(),
        files=(),
        sources=count_uses(opened).summarise({opened.name: opened.checkpoint}),
        donor=f"{opened.name}, the model",
        dtype_from=f"matrices as {coding.upper()}",
        warnings=opened.told,
    )
    return write_gguf(draft, opened.checkpoint, opened.offers, coding, value["gguf"], "convert")


def _make_files(checkpoint: Checkpoint, plain: list[OutputTensor], changes: Changes) -> tuple[SmallFile, ...]:
    legal = {name for name in checkpoint.files if name.upper().startswith(_LEGAL) or name == CARD_NAME}
    names = {*copied_files(checkpoint.files), *find_needed(checkpoint).present, *legal}.difference(QUANTIZATION_FILES)
    copied = tuple(copy_file(name, checkpoint) for name in sorted(names))
    if not checkpoint.config_text:
        return copied
    changed: Changes = dict.fromkeys(find_keys(checkpoint.config), REMOVED)
    if (dtype := CONFIG_DTYPES.get(find_main_dtype(plain))) is not None:
        changed |= dtype_changes(checkpoint.config, dtype)
    config = make_config(checkpoint.config_text, {**changed, **changes})
    return (*copied, SmallFile(CONFIG_NAME, config, None))

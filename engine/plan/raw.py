"""Raw merges: dictionaries of tensors of any kind, tensor by tensor and by name, without config and layers.

What `make.py` does for language models is done here for vision, speech and diffusion: a slot is a name. Nothing is tied
or optional. Decisions (2026-11-29): under `union`, a tensor that one model alone has is copied where the method takes
more than one, or needs a base that lacks it; counters of batches that were seen in training are those of the base, or
of the first model, since they count no model's weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method
from mergemill.engine.methods.own import GivenMethods, MethodsFile
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.offer import Offers
from mergemill.engine.plan.code import find_code, warn_of_code
from mergemill.engine.plan.coverage import VECTOR_UNUSED, Ledger
from mergemill.engine.plan.draft import SHARD_SIZE, Draft
from mergemill.engine.plan.fill import Filling, copy_offer, fill_slot, make_filling
from mergemill.engine.plan.importance import OpenImportances, open_importances, warn_of_importance
from mergemill.engine.plan.inputs import check_inputs
from mergemill.engine.plan.make import plan_recipe
from mergemill.engine.plan.opening import PlanOptions, Stages, open_models, warn_of_overrides
from mergemill.engine.plan.pipelines import check_pipelines, write_as_pipeline
from mergemill.engine.plan.prefixes import join_prefixes
from mergemill.engine.plan.settings import Site, check_names, choose_method, has_gradient, warn_of_unused
from mergemill.engine.plan.share import share_reads
from mergemill.engine.plan.slots import Slot, make_candidate
from mergemill.engine.plan.small_files import Inputs, make_inputs, make_raw_files
from mergemill.engine.plan.spellings import join_spellings, read_paths
from mergemill.engine.plan.stacks import Stack, Stretch
from mergemill.engine.plan.stages import find_offers, list_stored
from mergemill.engine.plan.steps import make_steps
from mergemill.engine.plan.summary import describe_choice, warn_of_dtypes
from mergemill.engine.plan.values import Origin, OutputTensor, Plan
from mergemill.engine.plan.vectors import check_delta_bases, has_vectors, list_vectors
from mergemill.engine.recipe import (
    GivenRecipe,
    ModelEntry,
    Parameters,
    Recipe,
    Source,
    recipe_to_json,
)
from mergemill.engine.recipe.stages import list_models
from mergemill.engine.storage.store import join_options, make_storage

Names = Literal["same", "union", "intersection"]
KINDS: Mapping[str, Names] = {"raw": "same", "raw union": "union", "raw intersection": "intersection"}
NOT_COMMON = "not in all models"
MOST_NAMED = 10  # in a message
_COUNTERS = ("num_batches_tracked", "*.num_batches_tracked")
_NOTHING = Family(**{field.name: () for field in fields(Family)})  # of which headers tell all


def make_raw_plan(
    recipe: GivenRecipe,
    *,
    names: Names = "same",
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    methods: Sequence[GivenMethods] = (),
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    round_stages: bool = False,
) -> Plan:
    """Plan the merge of dictionaries of tensors that `recipe` describes, as `make_plan` does that of language models.

    names: whether all models must have the same ones; a tensor is merged over those that have it (``union``), or
    dropped where one lacks it (``intersection``). Raises `InputError`.
    """
    if names not in get_args(Names):
        raise PlanError(f"names: {names!r} is unknown; known are {', '.join(get_args(Names))}")
    asked = PlanOptions(seed, methods, storage or {}, round_stages)
    return plan_recipe(recipe, asked, partial(_draft_one, names), shard_size)


def _draft_one(names: Names, recipe: Recipe, asked: PlanOptions, stages: Stages, where: str) -> tuple[Draft, Inputs]:
    """Return the draft of one merge, which may take stages for models, and its models."""
    if not isinstance(recipe, Recipe):
        raise PlanError(f"{where}: a mixture of experts is made of models with layers; leave --raw out")
    _check_raw(recipe, where)
    recipe = read_paths(recipe, list_models(recipe), where=where)
    refs = list_models(recipe)
    code = find_code(recipe, asked.methods)
    method = choose_method(recipe, code)
    storage = make_storage(join_options(asked.storage, recipe.storage))
    given = open_models(refs, storage, stages, where)
    recipe, opened, spelt = join_spellings(recipe, given, where=where)
    checkpoints, offers, told = join_prefixes(share_reads(opened), find_offers(opened, stages))
    importances = open_importances(recipe, method, _NOTHING, storage, where=where)
    raw = _Raw(recipe, names, method, checkpoints, asked.seed, code, importances, where)
    inputs = make_inputs(checkpoints, list_stored(checkpoints, stages), checkpoints[raw.donor])
    draft = _draft(
        raw, offers, inputs, [*warn_of_overrides(refs, where=where), *spelt, *(f"{where}: {each}" for each in told)]
    )
    return write_as_pipeline(draft, inputs.donor) if check_pipelines(checkpoints, where) else draft, inputs


@dataclass(frozen=True, slots=True)
class _Raw:
    """A raw merge whose models are open."""

    recipe: Recipe
    names: Names
    method: Method
    checkpoints: Mapping[str, Checkpoint]
    seed: int
    code: tuple[MethodsFile, ...]
    importances: OpenImportances
    where: str

    @property
    def base(self) -> str | None:
        """The base model, as the recipe writes it."""
        return None if self.recipe.base_model is None else str(self.recipe.base_model)

    @property
    def donor(self) -> str:
        """The model whose tensors stay where they are not merged."""
        return self.base or next(iter(self.checkpoints))

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """The models, in the recipe's order; a base that is not listed is the last."""
        models = self.recipe.models or ()
        listed = {str(entry.model) for entry in models}
        base = self.recipe.base_model
        return (*models, *([] if base is None or str(base) in listed else [ModelEntry(model=base)]))


def _check_raw(recipe: Recipe, where: str) -> None:
    given = ("slices", "modules", "tokenizer", "chat_template", "name_map", "transposed", "match_experts", "policy")
    for key in (*given, "quantize"):
        if getattr(recipe, key) is not None:
            raise PlanError(f"{where}: a raw merge takes tensors as they are called, and no config; leave {key} out")


def _draft(raw: _Raw, given: Mapping[str, Offers], inputs: Inputs, told: Sequence[str]) -> Draft:
    recipe, where = raw.recipe, raw.where
    stack = _make_stack(raw)
    own = [entry.parameters for entry in raw.entries]
    check_names(raw.method, [recipe.parameters, *own], recipe, where=where)
    check_delta_bases([stack], raw.method, where=where)
    offers = open_offers(raw.checkpoints, _NOTHING, given)
    check_inputs(recipe, raw.checkpoints, offers, _NOTHING, where=where)
    vectors, steps = list_vectors([stack]), make_steps(recipe, raw.method, where=where)
    filling = make_filling(recipe, offers, _NOTHING, raw.method, steps, vectors, raw.seed, where)
    filling = replace(filling, importances=raw.importances)
    ledger = Ledger()
    tensors = list(_fill(raw, stack, filling, ledger))
    for model in raw.checkpoints.keys() - {str(entry.model) for entry in raw.entries}:
        for name in raw.checkpoints[model].tensors:
            ledger.drop(model, name, VECTOR_UNUSED)
    kind = next(kind for kind, names in KINDS.items() if names == raw.names)
    return Draft(
        origin=Origin(kind, recipe.merge_method, recipe_to_json(recipe), recipe.text, recipe.file, raw.seed, raw.code),
        tensors=tensors,
        files=make_raw_files(recipe, raw.method, inputs, tensors, raw.code),
        sources=(*ledger.summarise(raw.checkpoints), *raw.importances.close(ledger)),
        donor=f"{raw.donor}, where models do not merge",
        dtype_from=describe_choice(recipe, raw.checkpoints),
        guard=filling.guard,
        storage=recipe.storage,
        scaling=steps.make_scaling([model for model, *_ in vectors], where=where),
        warnings=(
            *warn_of_code(recipe, raw.code, where=where),
            *(left for checkpoint in raw.checkpoints.values() for left in checkpoint.left_out),
            *told,
            *warn_of_dtypes(recipe, raw.checkpoints, tensors, where=where),
            *_warn_of_gradients(recipe, where),
            *warn_of_importance(recipe, raw.method, where=where),
            *warn_of_unused(raw.method, [recipe.parameters], own, where=where),
        ),
    )


def _make_stack(raw: _Raw) -> Stack:
    """Return the models as one layer of all tensors."""
    sources = tuple(
        Source(
            model=each.model,
            layer_range=(0, 1),
            delta_base=each.delta_base,
            importance=each.importance,
            parameters=each.parameters,
        )
        for each in raw.entries
    )
    return Stack("", (Stretch(sources, raw.base, (raw.recipe.parameters,)),), True)


def _fill(raw: _Raw, stack: Stack, filling: Filling, ledger: Ledger) -> Iterator[OutputTensor]:
    (stretch,) = stack.stretches
    _check_names(raw, [str(source.model) for source in stretch.sources])
    for name in sorted({name for found in filling.offers.values() for name in found}):
        candidates = tuple(
            make_candidate(source, name, place)
            for place, source in enumerate(stretch.sources)
            if name in filling.offers[str(source.model)]
        )
        slot = Slot(Site(name, 0.0, stretch.scopes), candidates, raw.base)
        if raw.names == "intersection" and len(candidates) < len(stretch.sources):
            for candidate in candidates:
                ledger.drop(candidate.model, name, NOT_COMMON)
            continue
        found = _fill_name(slot, raw, filling, ledger)
        if found is not None:
            yield found


def _fill_name(slot: Slot, raw: _Raw, filling: Filling, ledger: Ledger) -> OutputTensor | None:
    name, models = slot.site.tensor, [candidate.model for candidate in slot.candidates]
    if not models:
        return None  # of a model that is only taken from others
    if any(fnmatchcase(name, pattern) for pattern in _COUNTERS):
        return copy_offer(name, raw.donor if raw.donor in models else models[0], models, filling, ledger)
    lacks_base = raw.base is not None and raw.base not in models and has_vectors(raw.method, raw.base)
    alone = len(models) == 1 and (models[0] == raw.base or lacks_base or raw.method.least_inputs > 1)
    if alone and raw.names == "union":
        return copy_offer(name, models[0], models, filling, ledger)
    if lacks_base:
        raise PlanError(
            f"{raw.where}: tensor {name} is in {', '.join(models)} and not in the base model {raw.base}, from which "
            f"{raw.method.name} takes what they changed; --intersection drops such tensors"
        )
    return fill_slot(slot, filling, ledger)


def _check_names(raw: _Raw, models: Sequence[str]) -> None:
    """Raise `PlanError` unless all models have the same names, where they must."""
    if raw.names != "same":
        return
    held = {model: raw.checkpoints[model].tensors.keys() for model in models}
    everywhere = sorted(set().union(*held.values()))
    lacking = [(name, missing) for name in everywhere if (missing := [m for m in models if name not in held[m]])]
    if lacking:
        told = "; ".join(f"{name} is not in {', '.join(missing)}" for name, missing in lacking[:MOST_NAMED])
        more = f"; and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
        raise PlanError(
            f"{raw.where}: the models have different tensors: {told}{more}. --union merges each over the models that "
            f"have it, --intersection drops those that one lacks"
        )


def _warn_of_gradients(recipe: Recipe, where: str) -> Iterator[str]:
    """Yield a warning for each parameter with a value a layer: there are no layers."""
    given: list[Parameters] = [recipe.parameters, *(entry.parameters for entry in recipe.models or ())]
    for name in dict.fromkeys(name for each in given for name in each if has_gradient(each[name])):
        yield f"{where}: {name!r} is a gradient over layers, of which a raw merge knows none; its first value is taken"

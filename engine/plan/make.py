"""Making a plan: recipe × checkpoints → plan. Seconds, a few megabytes, headers only."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, choose_family
from mergemill.engine.checkpoint.needed import add_generation, find_needed
from mergemill.engine.checkpoint.terms import warn_of_terms
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.own import GivenMethods
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.layouts import Arrangement, join_layouts
from mergemill.engine.offers.names import name_alike, unwrap_names, warn_of_names
from mergemill.engine.offers.offer import Offers
from mergemill.engine.offers.ties import find_copies, warn_of_copies
from mergemill.engine.plan.adapters import apply_adapters, open_adapters, warn_of_bases
from mergemill.engine.plan.code import find_code, warn_of_code
from mergemill.engine.plan.collecting import pause_collector
from mergemill.engine.plan.coverage import COPY_UNUSED, Ledger
from mergemill.engine.plan.disagreement import warn_of_disagreement
from mergemill.engine.plan.draft import SHARD_SIZE, Draft, finish
from mergemill.engine.plan.fill import enter_unmerged, fill_slot, make_filling
from mergemill.engine.plan.filters import divide, list_filters, warn_of_filters
from mergemill.engine.plan.importance import open_importances, warn_of_importance
from mergemill.engine.plan.inputs import (
    check_heads,
    check_inputs,
    keeps_quantized,
    warn_of_activations,
    warn_of_dequantized,
    warn_of_missing_head,
)
from mergemill.engine.plan.later import find_later
from mergemill.engine.plan.opening import PlanOptions, Stages, check_kinds, open_models, warn_of_overrides
from mergemill.engine.plan.policy import make_policies, warn_of_policies
from mergemill.engine.plan.settings import check_names, choose_method, warn_of_residuals, warn_of_unused
from mergemill.engine.plan.share import share_reads
from mergemill.engine.plan.slots import iter_slots
from mergemill.engine.plan.small_files import Inputs, make_files, make_inputs, warn_of_missing_files
from mergemill.engine.plan.spellings import join_spellings, read_paths
from mergemill.engine.plan.stacks import Stack, make_stacks
from mergemill.engine.plan.stages import StageModel, add_stages, find_offers, list_stored, make_stage
from mergemill.engine.plan.steps import make_steps, sees_alone
from mergemill.engine.plan.summary import describe_choice, describe_donor, warn_of_dtypes
from mergemill.engine.plan.values import Origin, OutputTensor, Plan, SmallFile
from mergemill.engine.plan.vectors import check_delta_bases, list_vectors
from mergemill.engine.plan.vocabulary import make_renumbering
from mergemill.engine.plan.whole import check_ranges, check_whole, warn_of_config, warn_of_numbers
from mergemill.engine.plan.words import make_words, warn_of_words
from mergemill.engine.recipe import AnyRecipe, GivenRecipe, Parameters, Recipe, load_document, recipe_to_json
from mergemill.engine.recipe.stages import count_uses, keep_nothing, list_kept, list_models, order_stages
from mergemill.engine.storage.store import Storage, join_options, make_storage

DraftOne = Callable[[Any, PlanOptions, Stages, str], tuple[Draft, Inputs]]  # with what messages begin with


def make_plan(
    recipe: GivenRecipe,
    *,
    seed: int = 0,
    shard_size: str | int = SHARD_SIZE,
    methods: Sequence[GivenMethods] = (),
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    round_stages: bool = False,
) -> Plan:
    """Plan the merge that `recipe` (a value, a path, a mapping or YAML text) describes, from its models' headers.

    seed: of the random methods' masks. shard_size: the most bytes of an output file, or ``"tensor"`` for one file a
    tensor. methods: files of your own methods, beside those that the recipe names; a path, or a decorated function for
    the file that it stands in. storage: options of storage by scheme, such as a cluster file's; the recipe's are
    stronger. round_stages: a stage's tensors are rounded to the dtypes that it would be written in, so that the bytes
    are those of merging one after the other. Raises `InputError` for everything that is wrong with the recipe or its
    inputs.
    """
    return plan_recipe(recipe, PlanOptions(seed, methods, storage or {}, round_stages), draft_any, shard_size)


@pause_collector()
def plan_recipe(given: GivenRecipe, asked: PlanOptions, draft_one: DraftOne, shard_size: str | int) -> Plan:
    """Plan a recipe and its stages, of which each is drafted by `draft_one`."""
    recipe = load_document(given)
    if asked.round_stages and not recipe.round_stages:  # which the kept recipe says then, so that it works from there
        recipe = recipe.model_copy(update={"round_stages": True, "text": ""})
    kept = [f"{recipe.file or 'recipe'}: {one.name} is merged into {place} first" for place, one in list_kept(recipe)]
    draft, _ = _draft_all(keep_nothing(recipe), asked, draft_one)
    return finish(replace(draft, warnings=(*kept, *draft.warnings)), shard_size)


def plan_stage(recipe: Recipe, asked: PlanOptions, name: str) -> StageModel:
    """Return the model that a recipe makes, which is written nowhere, as a stage of this name."""
    draft, inputs = _draft_all(recipe, asked, draft_any)
    stage = recipe.model_copy(update={"name": name})
    return make_stage(stage, draft, inputs, rounded=bool(recipe.round_stages), where=recipe.file or name)


def _draft_all(recipe: AnyRecipe, asked: PlanOptions, draft_one: DraftOne) -> tuple[Draft, Inputs]:
    """Return the draft of a recipe with those of its stages, and the models of the last merge."""
    where = recipe.file or "recipe"
    asked = replace(asked, storage=join_options(asked.storage, recipe.storage))
    order, unused = order_stages(recipe, where=where)
    stages: dict[str, StageModel] = {}
    for stage in order:
        named = f"{where}: stage {stage.name}"
        if stage.quantize is not None:
            raise PlanError(f"{named}: quantize: a stage is written nowhere; say it of the result alone")
        draft, inputs = draft_one(stage.model_copy(update={"file": recipe.file}), asked, stages, named)
        stages[str(stage.name)] = make_stage(
            stage,
            draft,
            inputs,
            rounded=bool(recipe.round_stages),
            where=named,
            shared=count_uses(str(stage.name), [*order, recipe]) > 1,
        )
    draft, inputs = draft_one(recipe, asked, stages, where)
    draft = replace(draft, warnings=(*draft.warnings, *warn_of_terms(inputs.terms, where=where)))
    return add_stages(draft, stages, unused, where=where), inputs


def draft_any(recipe: AnyRecipe, asked: PlanOptions, stages: Stages, where: str) -> tuple[Draft, Inputs]:
    """Return the draft of a merge or of a mixture, which may take stages for models, and its models."""
    if isinstance(recipe, Recipe):
        return _draft(recipe, asked, stages, where)
    from mergemill.engine.plan.mixture import draft_mixture  # which a merge has no need of

    return draft_mixture(recipe, asked, stages, where)


def _draft(recipe: Recipe, asked: PlanOptions, stages: Stages, where: str) -> tuple[Draft, Inputs]:
    """Return the draft of one merge, which may take stages for models, and its models."""
    recipe = read_paths(recipe, list_models(recipe), where=where)
    refs = list_models(recipe)
    code = find_code(recipe, asked.methods)
    method = choose_method(recipe, code)
    steps = make_steps(recipe, method, where=where)
    reached = make_storage(join_options(asked.storage, recipe.storage))
    adapters = open_adapters(refs, reached)
    given = apply_adapters(refs, open_models(refs, reached, stages, where), adapters)
    recipe, opened, spelt = join_spellings(recipe, given, where=where)
    stored = share_reads(opened)
    check_kinds(stored, where)
    chosen = str(recipe.base_model) if recipe.base_model else next(iter(stored))
    family = choose_family(stored[chosen].config)
    checkpoints = name_alike(unwrap_names(stored), chosen, family, list((recipe.name_map or {}).items()), where=where)
    donor = add_generation(checkpoints[chosen])
    quantized = keeps_quantized(recipe, checkpoints)
    offers = open_offers(checkpoints, family, find_offers(checkpoints, stages), quantized=quantized)
    offers = _turn_given(recipe, offers, chosen, where)
    check_inputs(recipe, checkpoints, offers, family, where=where)
    later = find_later(recipe, checkpoints, offers, family)
    offers = later.leave_out(offers)
    offers, matched = _match_experts(recipe, offers, chosen, reached, where)
    renumbering = make_renumbering(recipe, checkpoints, offers, chosen, family, asked.seed)
    divides = functools.partial(divide, list_filters(recipe))
    offers, packs = join_layouts(offers, Arrangement(chosen, family, sees_alone(method, steps), divides))
    policies = make_policies(recipe, chosen, list(checkpoints), where=where)
    stacks = make_stacks(recipe, checkpoints, offers, family, policies)
    shared, own = _list_scopes(stacks)
    check_names(method, (*shared, *own), recipe, where=where)
    check_ranges(stacks, checkpoints, family, where=where)
    check_heads(stacks, checkpoints, family, policies, where=where)
    check_delta_bases(stacks, method, where=where)
    vectors = list_vectors(stacks)
    filling = make_filling(recipe, offers, family, method, steps, vectors, asked.seed, where)
    filling = replace(filling, checkpoints=checkpoints, policies=policies, packs=packs, renumbering=renumbering)
    importances = open_importances(recipe, method, family, reached, where=where)
    filling = replace(filling, importances=importances)
    ledger = Ledger()
    later.enter(checkpoints, ledger)
    for model, checkpoint in checkpoints.items():
        ledger.drop_all(model, find_copies(checkpoint, family), COPY_UNUSED)
    filled = (fill_slot(slot, filling, ledger) for slot in iter_slots(stacks, offers, family))
    tensors: Sequence[OutputTensor] = [tensor for tensor in filled if tensor is not None]
    enter_unmerged(policies, offers, ledger)
    needed = find_needed(donor)
    inputs = make_inputs(checkpoints, list_stored(checkpoints, stages), donor)
    expected = offers if renumbering is None else renumbering.expect(donor.ref, offers, tensors)
    check_whole(tensors, stacks, checkpoints, expected, donor, family, where=where)
    words = make_words(recipe, inputs, tensors, renumbering, where=where)
    tensors, mark = _quantize(tensors, recipe.quantize, donor, family, where)
    files = mark(make_files(recipe, method, inputs, stacks, tensors, needed, words, code))
    draft = Draft(
        origin=Origin("merge", recipe.merge_method, recipe_to_json(recipe), recipe.text, recipe.file, asked.seed, code),
        tensors=tensors,
        files=files,
        sources=(*ledger.close(checkpoints, stacks, family), *importances.close(ledger)),
        donor=describe_donor(recipe, list(checkpoints)),
        dtype_from=describe_choice(recipe, checkpoints),
        guard=filling.guard,
        storage=recipe.storage,
        scaling=steps.make_scaling([model for model, *_ in vectors], where=where),
        warnings=(
            *warn_of_code(recipe, code, where=where),
            *warn_of_overrides(refs, where=where),
            *(told for checkpoint in checkpoints.values() for told in checkpoint.left_out),
            *spelt,
            *warn_of_policies(policies, offers, where=where),
            *warn_of_names(checkpoints, chosen, where=where),
            *warn_of_bases(refs, adapters, where=where),
            *warn_of_dtypes(recipe, checkpoints, tensors, where=where),
            *warn_of_disagreement(donor, checkpoints, where=where),
            *(() if quantized else warn_of_dequantized(checkpoints, offers, where=where)),
            *warn_of_activations(checkpoints, offers, where=where),
            *warn_of_residuals(recipe, where=where),
            *matched,
            *warn_of_importance(recipe, method, where=where),
            *warn_of_unused(method, shared, own, where=where),
            *warn_of_filters(method, stacks, checkpoints, where=where),
            *warn_of_config(tensors, stacks, words.describe(donor), where=where),
            *warn_of_words(files, words, inputs, renumbering, where=where),
            *later.warn(where),
            *warn_of_numbers(stacks, donor, family, where=where),
            *warn_of_missing_files(needed, donor.ref, where=where),
            *warn_of_copies(checkpoints, family, where=where),
            *warn_of_missing_head(donor, [tensor.name for tensor in tensors], family, where=where),
        ),
        tokens=None if renumbering is None else renumbering.describe(),
    )
    return draft, inputs


def _turn_given(recipe: Recipe, offers: Mapping[str, Offers], donor: str, where: str) -> Mapping[str, Offers]:
    if not recipe.transposed:
        return offers
    from mergemill.engine.plan.transposed import turn_given  # which few merges need

    return turn_given(recipe, offers, donor, where=where)


def _match_experts(
    recipe: Recipe, offers: Mapping[str, Offers], donor: str, storage: Storage, where: str
) -> tuple[Mapping[str, Offers], list[str]]:
    """Return the offers with all models' experts in the donor's order, where that is asked for, and what is told."""
    if not recipe.match_experts:
        return offers, []
    from mergemill.engine.plan.expert_order import match_experts  # which few merges need

    return match_experts(recipe, offers, donor, storage, where=where)


def _quantize(
    tensors: Sequence[OutputTensor], scheme: str | None, donor: Checkpoint, family: Family, where: str
) -> tuple[Sequence[OutputTensor], Callable[[tuple[SmallFile, ...]], tuple[SmallFile, ...]]]:
    """Return the output with what `scheme` quantises, and what lets its config say so."""
    if scheme is None:
        return tensors, tuple
    from mergemill.engine.plan.quantize import quantize  # which few merges need

    made = quantize(tensors, scheme, donor, family, where=where)
    return made.tensors, made.mark


def _list_scopes(stacks: Sequence[Stack]) -> tuple[list[Parameters], list[Parameters]]:
    """Return the settings of slices, modules and the recipe, and those beside models."""
    stretches = [stretch for stack in stacks for stretch in stack.stretches]
    shared = [scope for stretch in stretches for scope in stretch.scopes]
    return shared, [source.parameters for stretch in stretches for source in stretch.sources]

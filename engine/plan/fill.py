"""Filling a slot: from candidates to the expression of one output tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergemill.engine.checkpoint import Checkpoint, read_vocabulary
from mergemill.engine.checkpoint.family import Family, is_optional, is_vocabulary, spell, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.methods.contract import Method
from mergemill.engine.offers.layouts import AS_THEY_ARE, Packs
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.alike import AlikeTensors
from mergemill.engine.plan.coverage import OPTIONAL_UNUSED, OTHERS, VECTOR_UNUSED, WEIGHTLESS, Ledger, Use
from mergemill.engine.plan.importance import OpenImportances
from mergemill.engine.plan.policy import MERGE_ALL, Policies, Verdict
from mergemill.engine.plan.renumbering import Renumbering
from mergemill.engine.plan.settings import Site
from mergemill.engine.plan.slots import Candidate, Slot
from mergemill.engine.plan.steps import Steps
from mergemill.engine.plan.values import OutputTensor
from mergemill.engine.plan.vectors import (
    Vectors,
    enter_delta_bases,
    find_delta_base,
    find_numbers,
    make_source,
)
from mergemill.engine.plan.weightless import leave_out
from mergemill.engine.recipe import Guard, Recipe
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, TORCH_DTYPES, is_mergeable, promote
from mergemill.engine.tensors.expressions import Agreed, Expression
from mergemill.engine.tensors.merged import Merged
from mergemill.engine.tensors.place import Place

MOST_TOKENS = 3  # that an error names


@dataclass(frozen=True, slots=True)
class Filling:
    """What filling needs to know beside the slot."""

    offers: Mapping[str, Offers]  # by model
    family: Family
    method: Method
    steps: Steps
    vectors: Vectors
    guard: Guard
    dtype: str | None  # to write; None: what the inputs promote to
    wide: bool  # whether to accumulate in float64 whatever the inputs
    seed: int
    stage: str  # the merge's name among several, which its random numbers depend on; empty where it has none
    where: str  # the recipe's name, for errors
    alike: AlikeTensors  # what many tensors have in common
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)  # by model: whose vocabularies errors name
    policies: Policies = MERGE_ALL
    packs: Packs = AS_THEY_ARE  # how the output stores what is merged as one tensor
    renumbering: Renumbering | None = None  # of tensors with a row a token
    importances: OpenImportances = field(default_factory=OpenImportances)


def make_filling(
    recipe: Recipe,
    offers: Mapping[str, Offers],
    family: Family,
    method: Method,
    steps: Steps,
    vectors: Vectors,
    seed: int,
    where: str,
) -> Filling:
    """Return what filling needs to know, as a recipe says it."""
    dtype, guard = recipe.out_dtype or recipe.dtype, recipe.guard or Guard()
    return Filling(
        offers,
        family,
        method,
        steps,
        vectors,
        guard,
        RECIPE_DTYPES[dtype] if dtype else None,
        "float64" in (recipe.dtype, recipe.out_dtype),
        seed,
        recipe.name or "",
        where,
        AlikeTensors(method, steps, guard, where),
    )


Found = tuple[Candidate, Offer]


def fill_slot(slot: Slot, filling: Filling, ledger: Ledger) -> OutputTensor | None:
    """Return the output tensor of `slot` and enter its inputs into the ledger; None where a rule drops them."""
    if filling.renumbering is not None:
        filling = replace(filling, offers=filling.renumbering.renumber(slot, filling.offers, ledger))
    if filling.policies.rules:
        verdict = filling.policies.find(_find_site(slot, filling).tensor)
        if verdict.action != "merge":
            return _follow(verdict, slot, filling, ledger)
    found = _find(slot, filling)
    if not found:
        return None
    if _has_role(slot, filling) and _is_buffer_without_base(slot, found, filling):
        _drop(found, OPTIONAL_UNUSED, ledger)
        return None
    _check_shapes(slot, found, filling)
    expression, dtype, unread = _make_expression(slot, found, filling, ledger)
    how: Use = "merged" if expression.is_merged else "copied"
    read = [each for each in found if each not in unread] if unread else found
    for candidate, offer in read:
        ledger.use_all(candidate.model, offer.uses, how)
    _drop(unread, WEIGHTLESS, ledger)
    unused = None if how == "merged" else VECTOR_UNUSED
    enter_delta_bases(slot, read, unused, filling.offers, ledger)
    enter_delta_bases(slot, unread, WEIGHTLESS, filling.offers, ledger)
    parts = filling.packs.find(slot.site.tensor, expression.shape, dtype)
    return OutputTensor(slot.site.tensor, dtype, expression, _most_growth(slot, expression, filling), parts)


def enter_unmerged(policies: Policies, offers: Mapping[str, Offers], ledger: Ledger) -> None:
    """Enter into the ledger what no output tensor takes because of a policy."""
    for model, found in offers.items():
        for name, rule in policies.find_unmerged(found):
            _drop_offer(model, found[name], rule, ledger)


def _find_site(slot: Slot, filling: Filling) -> Site:
    """Return where settings are looked up: filters know the names that the output has."""
    if not filling.packs.parts:
        return slot.site
    offers = (filling.offers[candidate.model].get(candidate.tensor) for candidate in slot.candidates)
    first = next((offer for offer in offers if offer is not None), None)
    parts = () if first is None else filling.packs.find(slot.site.tensor, first.shape, first.dtype)
    return slot.site._replace(tensor=parts[0].name) if parts else slot.site


def _follow(verdict: Verdict, slot: Slot, filling: Filling, ledger: Ledger) -> OutputTensor | None:
    """Return the tensor of one model, as it is or cast; None where the policy leaves it out."""
    if verdict.action == "drop":
        return None
    model, name = verdict.model, slot.site.tensor
    tensor = next((each.tensor for each in slot.candidates if each.model == model), None)
    outside = split_layer(name) is None
    offer = filling.offers[model].get(tensor or name) if tensor is not None or outside else None
    if offer is None:
        raise PlanError(
            f"{filling.where}: policy: tensor {name} is to be copied from {model}, which has none in its place; copy "
            f"it from a model that has it, or drop it"
        )
    for used in offer.uses:
        ledger.use(model, used, "copied")
    return _write_as_it_is(name, offer, filling)


def _write_as_it_is(name: str, offer: Offer, filling: Filling) -> OutputTensor:
    dtype = filling.dtype if filling.dtype and is_mergeable(offer.dtype) else offer.dtype
    return OutputTensor(name, dtype, offer.expression, None, filling.packs.find(name, offer.shape, dtype))


def copy_offer(name: str, model: str, models: Sequence[str], filling: Filling, ledger: Ledger) -> OutputTensor:
    """Return the output tensor that is one model's of the `models` that have it, and enter all into the ledger."""
    offer = filling.offers[model][name]
    _check_known(name, [offer.dtype], filling.where)
    for used in offer.uses:
        ledger.use(model, used, "copied")
    for other in (each for each in models if each != model):
        _drop_offer(other, filling.offers[other][name], OTHERS, ledger)
    return _write_as_it_is(name, offer, filling)


def _drop(found: Sequence[Found], rule: str, ledger: Ledger) -> None:
    for candidate, offer in found:
        _drop_offer(candidate.model, offer, rule, ledger)


def _drop_offer(model: str, offer: Offer, rule: str, ledger: Ledger) -> None:
    for name in offer.uses:
        ledger.drop(model, name, rule)


def _most_growth(slot: Slot, expression: Expression, filling: Filling) -> float | None:
    """Return where the guard keeps the base's tensor instead; None where it does not."""
    if filling.guard.policy != "keep-base" or not expression.is_merged:
        return None
    if not _has_role(slot, filling) and filling.method.base != "first of two":
        raise PlanError(
            f"{filling.where}: guard: keep-base needs a base model, which {filling.method.name} does not have here; "
            f"choose warn or fail"
        )
    return filling.guard.growth


def _find(slot: Slot, filling: Filling) -> list[Found]:
    """Return the candidates that exist, with what is offered for them; `PlanError` where some lack it."""
    found, missing = [], []
    for candidate in slot.candidates:
        offer = filling.offers[candidate.model].get(candidate.tensor)
        if offer is None:
            missing.append(candidate.model)
        else:
            found.append((candidate, offer))
    if found and missing and not is_optional(slot.site.tensor, filling.family):
        has = ", ".join(candidate.model for candidate, _ in found)
        raise PlanError(
            f"{filling.where}: tensor {slot.site.tensor} is in {has} but not in {', '.join(missing)}; "
            f"only models with the same tensors can be merged"
        )
    return found


def _has_role(slot: Slot, filling: Filling) -> bool:
    """Whether the base stands apart from the models here."""
    return filling.method.base == "required" or (filling.method.base == "optional" and slot.base is not None)


def _is_buffer_without_base(slot: Slot, found: Sequence[Found], filling: Filling) -> bool:
    return slot.base not in [each.model for each, _ in found] and is_optional(slot.site.tensor, filling.family)


def _check_shapes(slot: Slot, found: Sequence[Found], filling: Filling) -> None:
    (_, first), *others = found
    for candidate, offer in others:
        if offer.shape == first.shape:
            continue
        hint = ""
        if offer.shape == first.shape[::-1]:
            model = next(model for model in (candidate.model, found[0][0].model) if model != filling.policies.donor)
            module = slot.site.tensor.removesuffix(".weight").rpartition(".")[2]
            hint = f"if one stores it transposed, say so: 'transposed: [{{model: {model}, filter: {module}}}]'"
            hint += ", or give the rule that turns it by mistake a narrower filter"
        elif is_vocabulary(offer.uses[0], filling.family):
            hint = "models with equal vocabularies are needed, or 'tokenizer_source: union'"
            hint += _tell_of_rows(found[0], (candidate, offer), filling)
        raise PlanError(
            f"{filling.where}: tensor {slot.site.tensor}: {found[0][0].model} has shape {list(first.shape)}, "
            f"{candidate.model} {list(offer.shape)}; {hint or 'shapes must match'}"
        )


def _tell_of_rows(first: Found, second: Found, filling: Filling) -> str:
    """Say whose rows the larger of two models has more of; nothing where that is not known."""
    (_, fewer), (more, offer) = sorted((first, second), key=lambda each: each[1].shape)
    checkpoint = filling.checkpoints.get(more.model)
    vocabulary = None if checkpoint is None else read_vocabulary(checkpoint)
    if vocabulary is None or fewer.shape[1:] != offer.shape[1:]:
        return ""
    rows = range(fewer.shape[0], offer.shape[0])
    tokens = [repr(token[:40]) for token, number in vocabulary.items() if number in rows]
    if not tokens:
        return f"; no token of {more.model} has the rows from {rows.start} on"
    rest = f" and {len(tokens) - MOST_TOKENS} more" if len(tokens) > MOST_TOKENS else ""
    return f"; {more.model} has the rows from {rows.start} on for {', '.join(tokens[:MOST_TOKENS])}{rest}"


def _check_known(tensor: str, dtypes: Sequence[str], where: str) -> None:
    for dtype in dtypes:
        if dtype not in TORCH_DTYPES:
            raise PlanError(f"{where}: tensor {tensor}: dtype {dtype} cannot be merged or copied yet")


def _make_expression(
    slot: Slot, found: Sequence[Found], filling: Filling, ledger: Ledger
) -> tuple[Expression, str, list[Found]]:
    """Return what the tensor is made of, its dtype, and which of those that were found are not read for it."""
    dtypes = list(dict.fromkeys([offer.dtype for _, offer in found]))
    _check_known(slot.site.tensor, dtypes, filling.where)
    if all(map(is_mergeable, dtypes)):
        dtype = filling.dtype or promote(dtypes)
        expression, unread = _merge(slot, found, filling, ledger)
        return expression, dtype, unread
    if len(set(dtypes)) > 1:
        raise PlanError(
            f"{filling.where}: tensor {slot.site.tensor} is stored as {', '.join(dtypes)}; "
            f"a buffer that is not floating must have one dtype in all models"
        )
    models = tuple(candidate.model for candidate, _ in found)
    return Agreed(slot.site.tensor, tuple(offer.expression for _, offer in found), models), dtypes[0], []


def _merge(slot: Slot, found: Sequence[Found], filling: Filling, ledger: Ledger) -> tuple[Expression, list[Found]]:
    if filling.method.base != "none" and len(found) == 1 < len(slot.candidates):
        return found[0][1].expression, []  # an optional buffer that one model stores: nothing to merge it with
    if slot.alone and (filling.method.least_inputs > 1 or filling.method.base in ("required", "first of two")):
        return found[0][1].expression, []  # a module of one model, which the method takes as it is
    base, inputs = _split_base(slot, found, filling)
    shape = inputs[0][1].shape
    alike = filling.alike.find(
        _find_site(slot, filling),
        [(each.model, offer.matched or each.tensor, each.parameters) for each, offer in inputs],
        shape,
    )
    if alike.copied:
        return inputs[0][1].expression, []
    named = spell(slot.site.tensor, filling.family)  # random masks do not depend on the donor's spelling
    named = f"{filling.stage}/{named}" if filling.stage else named
    place = Place(named, shape, filling.seed, tuple([each.place for each, _ in inputs]), block=alike.block)
    delta_bases = [find_delta_base(slot, *each, filling.offers, where=filling.where) for each in inputs]
    importances = filling.importances.find(inputs, filling.method, slot.site.tensor, ledger)
    sources = [make_source(offer, own) for (_, offer), own in zip(inputs, delta_bases, strict=True)]
    read = [each for _, each in found] + [each for each in delta_bases if each is not None]
    wide = filling.wide or "F64" in [each.dtype for each in read]
    merged = Merged(
        alike.kernel,
        (
            *[offer.expression for _, offer in base],
            *sources,
            *importances,
        ),
        bool(base),
        alike.settings,
        place,
        "F64" if wide else "F32",
        alike.factors,
        find_numbers(filling.vectors, [each for each, _ in inputs]) if filling.steps.takes_squares else (),
        len(importances),
    )
    return leave_out(merged, alike.unread, alike.read_settings), [inputs[i] for i in alike.unread]


def _split_base(slot: Slot, found: Sequence[Found], filling: Filling) -> tuple[list[Found], list[Found]]:
    """Return the base and the other inputs, as the method takes them; `PlanError` where they do not suit it."""
    method = filling.method
    bases = [each for each in found if each[0].model == slot.base]
    if not bases and (_has_role(slot, filling) or method.base == "first of two"):
        _raise_without_base(slot, filling)
    if method.base in ("required", "optional") and len(bases) > 1:
        raise PlanError(
            f"{filling.where}: the base model {slot.base} is {len(bases)} of the sources of the slice that makes "
            f"{slot.site.tensor}; {method.name} needs it once, or which of them is the base would be a guess"
        )
    if method.base == "none":
        inputs, bases = list(found), []
    else:
        inputs = [each for each in found if each[0].model != slot.base]
    if method.base == "first of two":
        inputs, bases = [*bases, *inputs], []
    _check_count(slot, inputs, filling)
    return bases, inputs


def _raise_without_base(slot: Slot, filling: Filling) -> None:
    method = filling.method.name
    if slot.base is None:
        raise PlanError(f"{filling.where}: {method} needs 'base_model'")
    raise PlanError(
        f"{filling.where}: {method} needs the base model {slot.base} among the sources of the slice that makes "
        f"{slot.site.tensor}; which of its layers would otherwise be a guess"
    )


def _check_count(slot: Slot, inputs: Sequence[Found], filling: Filling) -> None:
    method = filling.method
    least, most = method.least_inputs, method.most_inputs
    if least <= len(inputs) and (most is None or len(inputs) <= most):
        return
    beside = " beside the base model" if _has_role(slot, filling) else ""
    names = ", ".join(candidate.model for candidate, _ in inputs) or "none"
    raise PlanError(
        f"{filling.where}: {method.name} takes {say_count(method)}{beside}; "
        f"tensor {slot.site.tensor} has {len(inputs)}: {names}"
    )


def say_count(method: Method) -> str:
    """Say how many models a method takes."""
    least, most = method.least_inputs, method.most_inputs
    wanted = f"exactly {least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
    return f"{wanted} model{'s' if wanted[-1] != '1' else ''}"

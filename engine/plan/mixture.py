"""Planning a mixture of experts: all but the experts is the base model's, and every MLP becomes several.

Source of the idea: Jiang et al., "Mixtral of Experts", arXiv:2401.04088; Komatsuzaki et al., "Sparse Upcycling",
arXiv:2212.05055; Goddard's mergekit-moe, whose files are read. Decisions (2026-11-29): of an expert the MLPs alone are
used, and whatever else it has is named as that; a tensor that the mixture has no place for is refused, whoever has it;
cut experts (`granularity`, arXiv:2410.07524) are numbered one MLP after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.config import CONFIG_DTYPES
from mergemill.engine.checkpoint.family import Family, choose_family, is_optional, split_layer
from mergemill.engine.errors import PlanError
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.offers.names import name_alike, unwrap_names, warn_of_names
from mergemill.engine.offers.offer import Offer, Offers
from mergemill.engine.plan.adapters import apply_adapters, open_adapters, warn_of_bases
from mergemill.engine.plan.architectures import Architecture, Sizes, choose_architecture, warn_of_loaders
from mergemill.engine.plan.coverage import OPTIONAL_UNUSED, Ledger
from mergemill.engine.plan.disagreement import warn_of_disagreement
from mergemill.engine.plan.draft import Draft
from mergemill.engine.plan.experts import LAYERS, MLP, Assembly, check_experts, make_experts, make_shared, warn_of_equal
from mergemill.engine.plan.gates import make_gate_job
from mergemill.engine.plan.inputs import check_models, warn_of_activations, warn_of_dequantized
from mergemill.engine.plan.layout import natural_order
from mergemill.engine.plan.mixture_files import make_mixture_files
from mergemill.engine.plan.opening import PlanOptions, Stages, check_kinds, open_models, warn_of_overrides
from mergemill.engine.plan.routers import Routing, copy_gates, make_routers, open_gates
from mergemill.engine.plan.share import share_reads
from mergemill.engine.plan.small_files import Inputs, make_inputs
from mergemill.engine.plan.spellings import join_spellings, read_paths
from mergemill.engine.plan.stages import find_offers, list_stored
from mergemill.engine.plan.values import Origin, OutputTensor
from mergemill.engine.recipe import Mixture, mixture_to_json
from mergemill.engine.recipe.stages import list_models
from mergemill.engine.storage.store import Storage, join_options, make_storage
from mergemill.engine.tensors.drawn import Filled
from mergemill.engine.tensors.dtypes import RECIPE_DTYPES, is_mergeable
from mergemill.engine.tensors.expressions import Expression

ONLY_MLP = "no MLP, which alone becomes an expert"
BASE_MLP = "MLP of the base model, which is no expert"
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_INSIDE = (
    *MLP,
    *(f"self_attn.{each}.weight" for each in ("q_proj", "k_proj", "v_proj", "o_proj")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")  # of Qwen3


def draft_mixture(mixture: Mixture, asked: PlanOptions, stages: Stages, where: str) -> tuple[Draft, Inputs]:
    """Return the draft of a mixture, which may take stages for models, and its models."""
    mixture = read_paths(mixture, list_models(mixture), where=where)
    refs = list_models(mixture)
    reached = make_storage(join_options(asked.storage, mixture.storage))
    adapters = open_adapters(refs, reached)
    given = apply_adapters(refs, open_models(refs, reached, stages, where), adapters)
    mixture, opened, spelt = join_spellings(mixture, given, where=where)
    stored = share_reads(opened)
    check_kinds(stored, where)
    chosen = str(mixture.base_model)
    family = choose_family(stored[chosen].config)
    checkpoints = name_alike(unwrap_names(stored), chosen, family, where=where)
    offers = open_offers(checkpoints, family, find_offers(checkpoints, stages))
    check_models(checkpoints, offers, family, copied=False, where=where)
    inputs = make_inputs(checkpoints, list_stored(checkpoints, stages), checkpoints[chosen])
    made = _Mixing(mixture, inputs, offers, family, reached, asked.seed, where)
    warnings = (
        *(told for checkpoint in checkpoints.values() for told in checkpoint.left_out),
        *spelt,
        *warn_of_names(checkpoints, chosen, where=where),
        *warn_of_bases(refs, adapters, where=where),
        *warn_of_overrides(refs, where=where),
        *warn_of_disagreement(inputs.donor, checkpoints, where=where),
        *warn_of_dequantized(checkpoints, offers, where=where),
        *warn_of_activations(checkpoints, offers, where=where),
    )
    return _draft(made, warnings), inputs


@dataclass(frozen=True, slots=True)
class _Mixing:
    """A mixture whose models are open."""

    mixture: Mixture
    inputs: Inputs
    offers: Mapping[str, Offers]
    family: Family
    storage: Storage
    seed: int
    where: str

    @property
    def base(self) -> str:
        """The base model, as the recipe writes it."""
        return str(self.mixture.base_model)


def _draft(made: _Mixing, warnings: Sequence[str]) -> Draft:
    mixture, donor, where = made.mixture, made.inputs.donor, made.where
    model_type = str(donor.config.get("model_type", ""))
    shared = sum(expert.count for expert in mixture.shared_experts)
    architecture = choose_architecture(mixture.architecture, model_type, shared, where=where)
    making = Assembly(mixture, architecture, made.offers, made.seed, where)
    layers = _count_layers(made)
    _check_models(made, architecture, layers)
    if making.packed and architecture.name == "deepseek":
        raise PlanError(f"{where}: layout packed is transformers' own, which has no deepseek; leave it out")
    channels = check_experts(making, layers)
    hidden = made.offers[made.base]["model.embed_tokens.weight"].shape[-1]
    routing = _find_routing(made, making, layers, hidden)
    ledger = Ledger()
    dtype = _find_dtype(mixture, donor)
    tensors = [
        _write(name, expression, dtype)
        for name, expression in sorted(
            (*_keep(made, architecture, ledger), *_make_layers(making, routing, layers)),
            key=lambda item: natural_order(item[0]),
        )
    ]
    _enter(made, making, layers, ledger)
    sizes = Sizes(making.count, mixture.experts_per_token, shared, mixture.granularity, channels)
    kept = [copy_gates(mixture.gates, made.storage)] if mixture.gates is not None else []
    return Draft(
        origin=Origin(
            "mixture",
            f"mixture of {making.count} experts ({architecture.name})",
            mixture_to_json(mixture),
            mixture.text,
            mixture.file,
            made.seed,
        ),
        tensors=tensors,
        files=(*kept, *make_mixture_files(mixture, architecture, made.inputs, tensors, sizes)),
        sources=ledger.summarise(made.inputs.models),
        donor=f"{made.base}, the base model",
        dtype_from="as dtype says" if mixture.dtype else "as the base model's config says" if dtype else "as stored",
        storage=mixture.storage,
        gates=routing.job,
        warnings=(
            *warnings,
            *warn_of_equal(making),
            *warn_of_loaders(architecture, making.count, packed=making.packed, where=where),
        ),
    )


def _find_routing(made: _Mixing, making: Assembly, layers: int, hidden: int) -> Routing:
    if made.mixture.gates is not None:
        return open_gates(made.mixture.gates, making, layers, hidden, made.storage)
    if made.mixture.is_prompted:
        return Routing(hidden, {}, make_gate_job(making, made.inputs.donor, layers, hidden))
    return Routing(hidden, {})


def _count_layers(made: _Mixing) -> int:
    """Return the number of layers, which all models have; `PlanError` where they do not."""
    counts = {model: each.config.get("num_hidden_layers") for model, each in made.inputs.models.items()}
    layers = counts[made.base]
    if type(layers) is not int or layers < 1:
        raise PlanError(f"{made.where}: the config of {made.base} does not say how many layers it has")
    for model, count in counts.items():
        if count != layers:
            raise PlanError(f"{made.where}: {made.base} has {layers} layers, {model} {count}; all must have as many")
    return layers


def _check_models(made: _Mixing, architecture: Architecture, layers: int) -> None:
    """Raise `PlanError` for a model of another family, or a tensor that the mixture has no place for."""
    for model, checkpoint in made.inputs.models.items():
        kind, act = checkpoint.config.get("model_type"), checkpoint.config.get("hidden_act")
        if kind not in architecture.takes:
            raise PlanError(
                f"{made.where}: {model} is a model of type {kind}; a {architecture.name} takes "
                f"{' or '.join(architecture.takes)}"
            )
        if act != made.inputs.donor.config.get("hidden_act"):
            raise PlanError(
                f"{made.where}: {model} has the activation {act}, the base model "
                f"{made.inputs.donor.config.get('hidden_act')}; all experts have one"
            )
        for name in made.offers[model]:
            if not _has_place(name, architecture, made.family):
                raise PlanError(
                    f"{made.where}: {model}: tensor {name} would be lost: a {architecture.name} has no place for it; "
                    f"{_advise(name)}"
                )


def _advise(name: str) -> str:
    return "architecture qwen has one for biases of q, k and v" if "self_attn" in name else "give a model without it"


def _has_place(name: str, architecture: Architecture, family: Family) -> bool:
    split = split_layer(name)
    if is_optional(name, family):
        return True
    if split is None:
        return name in _OUTSIDE
    rests = (*_INSIDE, *architecture.biases, *architecture.may_bias, *(_NORMS if architecture.name == "qwen3" else ()))
    return split[0] == LAYERS and split[2] in rests


def _find_dtype(mixture: Mixture, donor: Checkpoint) -> str | None:
    """Return the dtype that is written: the recipe's, or that of the base's config."""
    if mixture.dtype:
        return RECIPE_DTYPES[mixture.dtype]
    said = str(donor.config.get("dtype") or donor.config.get("torch_dtype") or "").removeprefix("torch.")
    return next((dtype for dtype, name in CONFIG_DTYPES.items() if name == said), None)


def _write(name: str, expression: Expression, dtype: str | None) -> OutputTensor:
    return OutputTensor(name, dtype if dtype and is_mergeable(expression.dtype) else expression.dtype, expression)


def _keep(made: _Mixing, architecture: Architecture, ledger: Ledger) -> Iterator[tuple[str, Expression]]:
    """Yield all of the base but its MLPs, and zeros for the biases that it lacks."""
    offers = made.offers[made.base]
    for name, offer in offers.items():
        split = split_layer(name)
        if is_optional(name, made.family):
            _drop(made.base, offer, OPTIONAL_UNUSED, ledger)
        elif split is None or split[2] not in MLP:
            for used in offer.uses:
                ledger.use(made.base, used, "copied")
            yield name, offer.expression
    for layer in range(_count_layers(made)):
        for bias in architecture.biases:
            weight = offers[f"{LAYERS}.{layer}.{bias.removesuffix('bias')}weight"]
            if f"{LAYERS}.{layer}.{bias}" not in offers:
                yield f"{LAYERS}.{layer}.{bias}", Filled(0.0, weight.shape[:1], weight.dtype)


def _make_layers(making: Assembly, routing: Routing, layers: int) -> Iterator[tuple[str, Expression]]:
    for layer in range(layers):
        for tensors in (make_experts(making, layer), make_shared(making, layer), make_routers(making, routing, layer)):
            for name, expression in tensors:
                yield f"{LAYERS}.{layer}.{name}", expression


def _enter(made: _Mixing, making: Assembly, layers: int, ledger: Ledger) -> None:
    """Enter what the experts read, and by which rule the rest is not."""
    for expert in dict.fromkeys((*making.routed, *making.shared)):
        model = str(expert.source_model)
        for layer in range(layers):
            for name in MLP:
                for used in made.offers[model][f"{LAYERS}.{layer}.{name}"].uses:
                    ledger.use(model, used, "copied")
    for model, checkpoint in made.inputs.models.items():
        for name in checkpoint.tensors:
            ledger.drop(model, name, BASE_MLP if model == made.base else ONLY_MLP)


def _drop(model: str, offer: Offer, rule: str, ledger: Ledger) -> None:
    for name in offer.uses:
        ledger.drop(model, name, rule)

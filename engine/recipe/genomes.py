"""Genomes of mergekit-evolve, as recipes with variables.

Source: what mergekit-evolve of mergekit 0.1.5 takes, and means by it. A genotype is [groups, models, filters + 1,
parameters], and so are the variables' order and names. What is ours (2026-11-29): a gene is a number of its own
interval, not folded by its absolute value, which makes two optima of one; densities start in the middle and not on the
wall; slerp's t is a gene itself, so that the whole arc can be reached; the output's dtype is its inputs'.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from mergemill.engine.recipe.faults import describe, make_faults, make_predicate, suggest
from mergemill.engine.recipe.leaves import Flag, OptionalFlag, Text, check_count, check_items
from mergemill.engine.recipe.references import ModelRef
from mergemill.engine.recipe.settings import check_filter
from mergemill.engine.recipe.shapes import Value
from mergemill.engine.recipe.vocabulary import TokenizerSource

PARAMETERS = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""The methods that genomes know, and which of their settings are genes."""
NORMALIZED = ("linear", "ties", "dare_ties")
REST = "rest"  # what no filter matches


def _check_method(value: object) -> object:
    if not isinstance(value, str) or value not in PARAMETERS:
        hint = suggest(value, PARAMETERS) if isinstance(value, str) else f"known here: {', '.join(PARAMETERS)}"
        raise make_predicate(f"is {describe(value)}, which no genome has; {hint}")
    return value


def _check_filters(value: object) -> object:
    items = check_items(value)
    for item in items if isinstance(items, list | tuple) else ():
        check_filter(item)
    return items


class Genome(Value):
    """Models, and the settings of a method that are searched."""

    called: ClassVar[str] = "a genome"

    models: Annotated[tuple[ModelRef, ...], BeforeValidator(check_items)]
    """The models that are merged."""
    merge_method: Annotated[str, BeforeValidator(_check_method)]
    """linear, task_arithmetic, ties, dare_ties or slerp."""
    base_model: ModelRef | None = None
    """What task vectors are taken from."""
    tokenizer_source: TokenizerSource | None = None
    """As a recipe's."""
    layer_granularity: Annotated[int, BeforeValidator(lambda value: check_count(value or 0, least=0))] = 0
    """Layers of a group, which have genes of their own; 0: all are one group."""
    filters: Annotated[tuple[Text, ...] | None, BeforeValidator(_check_filters)] = None
    """Parts of tensors' names that have genes of their own, beside one for the rest."""
    smooth: Flag = False
    """Whether groups are no slices, but points of gradients over the layers."""
    normalize: OptionalFlag = None
    """The method's; else true for linear, ties and dare_ties."""
    allow_negative_weights: Flag = False
    """Whether weights may be negative."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The settings that are genes."""
        return PARAMETERS[self.merge_method]

    @property
    def open_filters(self) -> tuple[str, ...]:
        """The filters, and what stands for the rest."""
        return (*(self.filters or ()), REST)


def make_genes(genome: Genome, layers: int) -> dict[str, dict[str, float]]:
    """Return the variables of a genome, as a search file would write them, in the order of the flattened genotype."""
    count = len(genome.models)
    box = {
        "weight": {"low": -1.0 if genome.allow_negative_weights else 0.0, "high": 1.0, "start": 1 / count},
        "density": {"low": 0.0, "high": 1.0, "start": 0.5},
        "t": {"low": 0.0, "high": 1.0, "start": 0.5},
    }
    models = range(1 if genome.merge_method == "slerp" else count)
    return {
        name_gene(group, model, part, parameter): box[parameter]
        for group in range(_count_groups(genome, layers))
        for model in models
        for part in genome.open_filters
        for parameter in genome.parameters
    }


def name_gene(group: int, model: int, part: str, parameter: str) -> str:
    """Return the name of a variable of a genome.

    >>> name_gene(0, 1, "mlp", "weight")
    'group0.model1.mlp.weight'
    """
    return f"group{group}.model{model}.{part}.{parameter}"


def make_genome_recipe(genome: Genome, layers: int) -> dict[str, Any]:
    """Return the recipe of a genome, in which each gene is a variable."""
    groups = _count_groups(genome, layers)
    each = layers // groups
    recipe: dict[str, Any] = {"merge_method": genome.merge_method}
    if genome.base_model or genome.merge_method == "slerp":
        recipe["base_model"] = _dump(genome.base_model or genome.models[0])
    if genome.tokenizer_source is not None:
        recipe["tokenizer_source"] = genome.model_dump(mode="json")["tokenizer_source"]
    normalize = genome.merge_method in NORMALIZED if genome.normalize is None else genome.normalize
    if genome.merge_method != "slerp" and (genome.merge_method in NORMALIZED or genome.normalize is not None):
        recipe["parameters"] = {"normalize": normalize}
    if genome.smooth:
        return recipe | _merge_groups(genome, range(groups))
    slices = [_slice_group(genome, group, group * each, (group + 1) * each) for group in range(groups)]
    return recipe | {"slices": slices}


def _count_groups(genome: Genome, layers: int) -> int:
    """Return the number of groups; a fault where they would not be alike."""
    size = genome.layer_granularity
    if size and layers % size:
        words = f"is {size}, which does not divide the {layers} layers of {genome.models[0]}"
        raise make_faults([(("genome", "layer_granularity"), make_predicate(words))])
    if genome.merge_method == "slerp" and len(genome.models) != 2:
        words = f"are {len(genome.models)}; slerp merges two, of which a genome says how far from the first it is"
        raise make_faults([(("genome", "models"), make_predicate(words))])
    return layers // size if size else 1


def _slice_group(genome: Genome, group: int, start: int, stop: int) -> dict[str, Any]:
    sources = [
        {"model": _dump(model), "layer_range": [start, stop], **_set(genome, [group], place)}
        for place, model in enumerate(_with_base(genome))
    ]
    shared = _set_shared(genome, [group])
    return {"sources": sources, **shared}


def _merge_groups(genome: Genome, groups: Iterable[int]) -> dict[str, Any]:
    groups = list(groups)
    models = [{"model": _dump(model), **_set(genome, groups, place)} for place, model in enumerate(_with_base(genome))]
    return {"models": models, **_set_shared(genome, groups)}


def _with_base(genome: Genome) -> list[ModelRef]:
    """Return the models, and the base after them where it is none of them."""
    base = genome.base_model
    return [*genome.models, *([base] if base and base not in genome.models else [])]


def _set(genome: Genome, groups: Sequence[int], place: int) -> dict[str, Any]:
    """Return the settings of a model: none of the base's, none of slerp's, which are shared."""
    if genome.merge_method == "slerp" or place >= len(genome.models):
        return {}
    return {"parameters": _make_settings(genome, groups, place)}


def _set_shared(genome: Genome, groups: Sequence[int]) -> dict[str, Any]:
    return {"parameters": _make_settings(genome, groups, 0)} if genome.merge_method == "slerp" else {}


def _make_settings(genome: Genome, groups: Sequence[int], place: int) -> dict[str, Any]:
    return {parameter: _make_setting(genome, groups, place, parameter) for parameter in genome.parameters}


def _make_setting(genome: Genome, groups: Sequence[int], place: int, parameter: str) -> Any:
    """Return a variable, or conditions by filter with the open one last; several groups are a gradient."""
    values = [[f"${{{name_gene(group, place, part, parameter)}}}" for group in groups] for part in genome.open_filters]
    plain = [value if len(groups) > 1 else value[0] for value in values]
    if len(plain) == 1:
        return plain[0]
    conditions: list[dict[str, Any]] = [
        {"filter": part, "value": value} for part, value in zip(genome.filters or (), plain[:-1], strict=True)
    ]
    return [*conditions, {"value": plain[-1]}]


def _dump(model: ModelRef) -> Any:
    return model.model_dump(mode="json")

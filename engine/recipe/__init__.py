"""Recipes and cluster files: YAML to frozen values, strictly. Reads nothing but the file itself."""

from mergemill.engine.recipe.clusters import Adaptive, ClusterFile, list_clusters, load_cluster, parse_cluster
from mergemill.engine.recipe.leaves import CHAT_TEMPLATES, DtypeName
from mergemill.engine.recipe.mixtures import AnyRecipe, Expert, Mixture, mixture_to_json
from mergemill.engine.recipe.names import NameMap, Policy, TransposedWeights
from mergemill.engine.recipe.parsing import (
    GivenRecipe,
    load_document,
    load_recipe,
    make_recipe,
    parse_document,
    parse_recipe,
    read_recipe,
)
from mergemill.engine.recipe.references import ModelRef, parse_reference
from mergemill.engine.recipe.schema import recipe_schema
from mergemill.engine.recipe.settings import Condition, Parameters, Scalar, Setting
from mergemill.engine.recipe.steps import GivenStep, Guard
from mergemill.engine.recipe.values import (
    ModelEntry,
    Module,
    Modules,
    Recipe,
    Slice,
    Source,
    recipe_to_json,
)
from mergemill.engine.recipe.vocabulary import (
    ModelRow,
    Token,
    Tokenizer,
    TokenizerSource,
    Tokens,
    TokenSource,
    ZeroRow,
)

__all__ = [
    "CHAT_TEMPLATES",
    "Adaptive",
    "AnyRecipe",
    "ClusterFile",
    "Condition",
    "DtypeName",
    "Expert",
    "GivenRecipe",
    "GivenStep",
    "Guard",
    "Mixture",
    "ModelEntry",
    "ModelRef",
    "ModelRow",
    "Module",
    "Modules",
    "NameMap",
    "Parameters",
    "Policy",
    "Recipe",
    "Scalar",
    "Setting",
    "Slice",
    "Source",
    "Token",
    "TokenSource",
    "Tokenizer",
    "TokenizerSource",
    "Tokens",
    "TransposedWeights",
    "ZeroRow",
    "list_clusters",
    "load_cluster",
    "load_document",
    "load_recipe",
    "make_recipe",
    "mixture_to_json",
    "parse_cluster",
    "parse_document",
    "parse_recipe",
    "parse_reference",
    "read_recipe",
    "recipe_schema",
    "recipe_to_json",
]

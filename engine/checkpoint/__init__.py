"""What is stored: headers, index, config, tokenizer files; opening a model without its weights."""

from mergemill.engine.checkpoint.card import Card, hub_names, make_card
from mergemill.engine.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_file
from mergemill.engine.checkpoint.config import (
    CONFIG_DTYPES,
    Changes,
    LayerCount,
    dtype_changes,
    find_layer_count,
    layer_changes,
    make_config,
    says_tied,
    tie_changes,
    vocabulary_changes,
)
from mergemill.engine.checkpoint.copied_files import copied_files
from mergemill.engine.checkpoint.family import (
    Family,
    Side,
    choose_family,
    find_side,
    find_tie,
    is_optional,
    is_vocabulary,
    join_layer,
    layer_stacks,
    split_layer,
)
from mergemill.engine.checkpoint.header import Header, parse_header, read_header
from mergemill.engine.checkpoint.index import INDEX_NAME, check_index, parse_index
from mergemill.engine.checkpoint.layout import DTYPE_BITS, TensorInfo, file_order, make_header, make_offsets
from mergemill.engine.checkpoint.terms import Terms, common_license, read_terms, warn_of_terms
from mergemill.engine.checkpoint.vocabulary import read_vocabulary, same_tokenizer
from mergemill.engine.checkpoint.weights import StoredTensor

__all__ = [
    "CONFIG_DTYPES",
    "DTYPE_BITS",
    "INDEX_NAME",
    "Card",
    "Changes",
    "Checkpoint",
    "Family",
    "Header",
    "LayerCount",
    "Side",
    "StoredTensor",
    "TensorInfo",
    "Terms",
    "check_index",
    "choose_family",
    "common_license",
    "copied_files",
    "dtype_changes",
    "file_order",
    "find_layer_count",
    "find_side",
    "find_tie",
    "hub_names",
    "is_optional",
    "is_vocabulary",
    "join_layer",
    "layer_changes",
    "layer_stacks",
    "make_card",
    "make_config",
    "make_header",
    "make_offsets",
    "open_checkpoint",
    "parse_header",
    "parse_index",
    "read_file",
    "read_header",
    "read_terms",
    "read_vocabulary",
    "same_tokenizer",
    "says_tied",
    "split_layer",
    "tie_changes",
    "vocabulary_changes",
    "warn_of_terms",
]

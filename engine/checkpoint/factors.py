"""Adapters where a model is expected: a file of factors, or factors that were never merged into their weights.

The names are those of peft (LoRA, LoHa, LoKr, OFT, IA3, VeRA), and of the tools that followed kohya's.
"""

import re
from collections.abc import Collection

_FACTOR = re.compile(
    r"(?:^|\.)(?:lora_(?:A|B|E|down|up|embedding_[AB]|magnitude_vector)|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|"
    r"oft_(?:r|s|blocks)|ia3_l|vera_lambda_[bd])(?:\.|$)"
)


def find_factors(names: Collection[str]) -> tuple[str, ...]:
    """Return those of a checkpoint's tensors that are factors of an adapter.

    >>> find_factors(["x.q_proj.lora_A.default.weight", "x.q_proj.weight", "x.w_lora.lora.0.weight"])
    ('x.q_proj.lora_A.default.weight',)
    """
    return tuple(name for name in names if _FACTOR.search(name))

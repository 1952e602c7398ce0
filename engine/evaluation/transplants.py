"""What transplanted tokenizers make of a text, before any is written: perplexity per byte, method by method.

Vocabularies cut a text into other tokens, so only what a byte costs can be compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.evaluation.evaluating import TextSource, evaluate, evaluate_plans
from mergemill.engine.evaluation.judging import MEMORY
from mergemill.engine.plan.transplant import make_transplant_plan
from mergemill.engine.storage.store import make_storage

BEFORE = "before"


def judge_transplants(
    model: str,
    donor: str,
    source: TextSource,
    methods: Sequence[str],
    *,
    memory: str | int | None = None,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return the perplexity per byte of `source` by method, that of the model as it is first, as `BEFORE`.

    options: those of `make_transplant_plan`, but for the method. Raises `InputError`.
    """
    plans = [make_transplant_plan(model, donor, storage=storage, method=each, **options) for each in methods]
    taken = MEMORY if memory is None else memory
    own = evaluate(model, source, memory=taken, storage=storage)
    found = evaluate_plans(plans, source, taken, make_storage(storage))
    judged = {BEFORE: own, **dict(zip(methods, found, strict=True))}
    return {name: 2.0**each.bits_per_byte for name, each in judged.items()}

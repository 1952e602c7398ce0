"""The objective `lm_eval`: a model judged by lm-evaluation-harness, in a process of its own.

That process is `lm_eval_program.py`: what it takes goes with it, and one that hangs or is killed fails its candidate
alone. Each candidate is judged on the same samples.
"""

import json
import math
import sys
from importlib.util import find_spec

from mergemill.engine.errors import InputError
from mergemill.engine.recipe.harness import HarnessObjective
from mergemill.engine.search.command import CommandFailed, run_words

NAME = "lm_eval"


def check_lm_eval(objective: HarnessObjective, where: str) -> None:
    """Raise `InputError` where the package, or that of the backend, is missing."""
    for package in ("lm_eval", *(("vllm",) if objective.backend == "vllm" else ())):
        if find_spec(package) is None:
            needs = "pip install mergemill[lm-eval]" if package == "lm_eval" else "pip install vllm"
            raise InputError(f"{where}: the objective lm_eval needs the package {package}: {needs}")


Result = tuple[float, float | None, tuple[float, ...]]
"""A score, its standard error where it is known, and each task's metric."""


def run_lm_eval(objective: HarnessObjective, model: str, limit_s: float) -> Result:
    """Return what lm_eval says of the model in a folder; `CommandFailed` where it says nothing."""
    asked = objective.model_dump(mode="json") | {"model": model}
    words = [sys.executable, "-m", "mergemill.engine.search.lm_eval_program", json.dumps(asked)]
    printed = run_words(words, limit_s, NAME).decode(errors="replace").strip().rpartition("\n")[2]
    try:
        found = json.loads(printed)
    except ValueError:
        raise CommandFailed(f"{NAME}: printed no result") from None
    metrics, errors = [], []
    for each in objective.tasks:
        own = found.get(each.task) or {}
        value = own.get(each.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            known = ", ".join(name for name, number in own.items() if isinstance(number, int | float))
            raise CommandFailed(f"{NAME}: {each.task} has no number {each.metric!r}; it has {known or 'none'}")
        name, _, rest = each.metric.partition(",")
        error = own.get(f"{name}_stderr,{rest}")
        metrics.append(float(value))
        errors.append(each.weight * error if isinstance(error, int | float) and math.isfinite(error) else None)
    score = math.fsum(each.weight * value for each, value in zip(objective.tasks, metrics, strict=True))
    found_errors = [error for error in errors if error is not None]
    return score, math.hypot(*found_errors) if len(found_errors) == len(errors) else None, tuple(metrics)

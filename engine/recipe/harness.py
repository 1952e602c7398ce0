"""The objective `lm_eval`: tasks of lm-evaluation-harness, and as mergekit-evolve writes them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from mergemill.engine.recipe.faults import describe, make_predicate
from mergemill.engine.recipe.leaves import Flag, OptionalCount, OptionalText, Text, check_count, check_items
from mergemill.engine.recipe.shapes import Value

PUBLIC = (
    *("agieval", "ai2_arc", "anli", "arc_", "bbh", "bigbench", "blimp", "boolq", "ceval", "cmmlu", "commonsense_qa"),
    *("copa", "drop", "glue", "gpqa", "gsm8k", "hellaswag", "hendrycks", "humaneval", "ifeval", "lambada"),
    *("leaderboard", "longbench", "mathqa", "mbpp", "mgsm", "minerva_math", "mmlu", "mmmu", "musr", "nq_open"),
    *("openbookqa", "piqa", "race", "ruler", "sciq", "squad", "super_glue", "swag", "triviaqa", "truthfulqa"),
    *("wikitext", "winogrande", "wsc", "xnli", "xstorycloze", "xwinograd"),
)
"""What the names of public benchmarks begin with."""


class HarnessTask(Value):
    """A task, and which of its numbers counts."""

    called: ClassVar[str] = "a task of lm_eval"

    task: Text
    """The task's name."""
    metric: Text = "acc,none"
    """Which of its numbers, with the name of its filter."""
    weight: float = 1.0
    """What it is multiplied by in the sum."""


class EvolveTask(Value):
    """A task of lm_eval, as mergekit-evolve writes it."""

    called: ClassVar[str] = "a task"

    name: Text
    """The task's name."""
    metric: Text = "acc,none"
    """Which of its numbers."""
    weight: float = 1.0
    """Its share."""


EvolveTasks = Annotated[tuple[EvolveTask, ...], BeforeValidator(check_items)]


def _check_arguments(value: object) -> object:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise make_predicate(f"must be a mapping of names to values, not {describe(value)}")
    return tuple(sorted(value.items()))


class HarnessObjective(Value):
    """What lm_eval measures of a model: the sum of each task's metric times its weight; more is better."""

    called: ClassVar[str] = "an objective of lm_eval"

    tasks: Annotated[tuple[HarnessTask, ...], BeforeValidator(check_items)]
    """The tasks."""
    backend: Annotated[Literal["hf", "vllm"], BeforeValidator(lambda value: _check_backend(value))] = "hf"
    """What runs the model: `hf` (transformers) or `vllm`."""
    limit: OptionalCount = None
    """So many samples of each task, the same for each candidate; else all."""
    num_fewshot: Annotated[int | None, BeforeValidator(lambda value: check_count(value, least=0))] = None
    """So many examples before each sample; else as the task says."""
    apply_chat_template: Flag = False
    """Whether samples are written by the model's chat template."""
    fewshot_as_multiturn: Flag = False
    """Whether examples are turns of a conversation."""
    model_args: Annotated[tuple[tuple[str, Any], ...], BeforeValidator(_check_arguments)] = ()
    """What the backend is given beside the model: `{dtype: bfloat16, device: cuda}`."""
    include_path: OptionalText = None
    """A folder with tasks of your own."""

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The tasks that are test sets of public benchmarks."""
        return tuple(each.task for each in self.tasks if each.task.startswith(PUBLIC))


def _check_backend(value: object) -> object:
    if value not in ("hf", "vllm"):
        raise make_predicate(f"is {describe(value)}; known here: hf, vllm")
    return value


def make_harness(tasks: Sequence[EvolveTask], said: Mapping[str, Any]) -> HarnessObjective:
    """Return the objective of mergekit-evolve's tasks; `said` are the other keys of its file."""
    own = tuple(HarnessTask(task=each.name, metric=each.metric, weight=each.weight) for each in tasks)
    return HarnessObjective(tasks=own, **said)

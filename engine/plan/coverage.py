"""The ledger: every tensor of every input is merged, copied, or dropped by a named rule; anything else is an error."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.checkpoint.family import Family, find_side, is_optional
from mergemill.engine.errors import PlanError
from mergemill.engine.plan.stacks import Stack, find_owner, models_of, split_stack
from mergemill.engine.plan.values import SourceUse

Use = Literal["merged", "copied"]
Wanted = Mapping[tuple[str, str], Collection[range]]  # by model and stack

LAYER_UNUSED = "layer outside every slice"
BEFORE_UNUSED = "before the layers, which come from the first slice"
AFTER_UNUSED = "after the layers, which come from the last slice"
OPTIONAL_UNUSED = "buffer that the base model does not store"
WEIGHTLESS = "weight 0"
LATER_UNUSED = "predicts later tokens (MTP), which the output does not"
COPY_UNUSED = "copy of the embedding, to which the config says it is tied"
OTHERS = "another model's is taken"
VECTOR_UNUSED = "of a delta_base, where no task vector is taken"


@dataclass(slots=True)
class Ledger:
    """What happens to each input tensor, filled while the plan is made."""

    _fates: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> tensor -> merged, copied or a rule

    def use(self, model: str, tensor: str, how: Use) -> None:
        """Note that an output tensor reads this one; merging counts before copying."""
        self.use_all(model, (tensor,), how)

    def use_all(self, model: str, tensors: Iterable[str], how: Use) -> None:
        """Note that an output tensor reads these."""
        fates = self._fates.setdefault(model, {})
        for tensor in tensors:
            if fates.get(tensor) != "merged":
                fates[tensor] = how

    def drop(self, model: str, tensor: str, rule: str) -> None:
        """Note that nothing reads this one, by a named rule."""
        self._fates.setdefault(model, {}).setdefault(tensor, rule)

    def drop_all(self, model: str, tensors: Iterable[str], rule: str) -> None:
        """Note that nothing reads these, by a named rule."""
        for name in tensors:
            self.drop(model, name, rule)

    def close(
        self, checkpoints: Mapping[str, Checkpoint], stacks: Sequence[Stack], family: Family
    ) -> tuple[SourceUse, ...]:
        """Drop what no slice wants; `PlanError` names a tensor that nothing accounts for."""
        wanted = _wanted_layers(stacks)
        sources = [source for stack in stacks for stretch in stack.stretches for source in stretch.sources]
        taken_from = {str(source.delta_base) for source in sources if source.delta_base is not None}
        for model, checkpoint in checkpoints.items():
            for name in [each for each in checkpoint.tensors if each not in self._fates.get(model, ())]:
                rule = _rule(model, name, wanted, stacks, family)
                if rule is None and model in taken_from and is_optional(name, family):
                    rule = VECTOR_UNUSED
                if rule is None:
                    raise PlanError(f"{model}: tensor {name} would be lost: nothing merges, copies or drops it")
                self.drop(model, name, rule)
        return self.summarise(checkpoints)

    def summarise(self, checkpoints: Mapping[str, Checkpoint]) -> tuple[SourceUse, ...]:
        """Return what the merge takes from each model, all of whose tensors are noted."""
        return tuple(self._summarise(model, checkpoint) for model, checkpoint in checkpoints.items())

    def _summarise(self, model: str, checkpoint: Checkpoint) -> SourceUse:
        known = self._fates.get(model, {})
        fates = {name: known[name] for name in checkpoint.tensors}
        counts = Counter(fates.values())
        read = sum(checkpoint.tensors[name].nbytes for name, fate in fates.items() if fate in ("merged", "copied"))
        merged, copied = counts.pop("merged", 0), counts.pop("copied", 0)
        return SourceUse(model, checkpoint.path, len(fates), merged, copied, dict(sorted(counts.items())), read)


def _wanted_layers(stacks: Sequence[Stack]) -> Wanted:
    wanted: dict[tuple[str, str], set[range]] = defaultdict(set)
    for stack in stacks:
        for source in (source for stretch in stack.stretches for source in stretch.sources):
            for model in models_of(source):
                wanted[model, stack.name].add(range(*source.layer_range))
    return wanted


def _rule(model: str, name: str, wanted: Wanted, stacks: Sequence[Stack], family: Family) -> str | None:
    split = split_stack(name, [stack.name for stack in stacks if stack.layered])
    if split is not None:
        ranges = wanted.get((model, split[0]), ())
        return None if any(split[1] in layers for layers in ranges) else LAYER_UNUSED
    before, stretches = find_side(name, family) == "before", find_owner(name, stacks, family).stretches
    sources = stretches[0 if before else -1].sources
    if any(model in models_of(source) for source in sources):
        return None
    return BEFORE_UNUSED if before else AFTER_UNUSED

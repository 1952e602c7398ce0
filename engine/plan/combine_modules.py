"""The modules that adapters change, of those that are combined to one; what does not add up is refused by name."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

from mergemill.engine.checkpoint.adapter import Adapter, open_adapter
from mergemill.engine.checkpoint.adapter_config import PLAIN_LORA
from mergemill.engine.checkpoint.weights import StoredTensor
from mergemill.engine.errors import PlanError
from mergemill.engine.recipe.adapters import AdapterRecipe
from mergemill.engine.storage.store import Storage


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """A module that one adapter changes at least."""

    path: str
    kind: str  # "" or "embedding_"
    having: tuple[tuple[int, StoredTensor, StoredTensor, int, float], ...]  # which adapter, A, B, rank and scale
    into: int
    out: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of the adapters that have it."""
        return tuple(rank for _, _, _, rank, _ in self.having)

    def name_side(self, side: str) -> str:
        """Return the name of A or B in the result."""
        tail = f"lora_embedding_{side}" if self.kind else f"lora_{side}.weight"
        return f"base_model.model.{self.path}.{tail}"


def open_combined(recipe: AdapterRecipe, storage: Storage, where: str) -> list[Adapter]:
    """Open the adapters of a document; `PlanError` for one whose changes are no sum."""
    refs = [entry.adapter for entry in recipe.adapters]
    if twice := next((ref for ref in refs if refs.count(ref) > 1), None):
        raise PlanError(f"{where}: {twice} is named twice; name it once, with its weights added up")
    with ThreadPoolExecutor(min(len(refs), 8)) as pool:
        adapters = list(pool.map(lambda ref: open_adapter(ref.path, ref.revision, storage), refs))
    for adapter in adapters:
        if adapter.config.beginning is not None:
            raise PlanError(
                f"{where}: {adapter.ref}: init_lora_weights is {adapter.config.beginning!r}: it belongs to a base that "
                f"peft changes on loading, and none is read here; {PLAIN_LORA}"
            )
        if adapter.config.has_magnitudes:
            raise PlanError(f"{where}: {adapter.ref}: is DoRA, whose magnitudes do not add up; merge it into its model")
        if adapter.config.parameters:
            raise PlanError(
                f"{where}: {adapter.ref}: has factors of packed experts (target_parameters), which are not combined; "
                f"merge each adapter into its model, and the models"
            )
        other = next(iter(adapter.whole.values()), None) or next(
            (each for of in adapter.parts.values() for part, each in of.items() if part in ("bias", "tokens")), None
        )
        if other is not None:
            raise PlanError(
                f"{where}: {adapter.ref}: tensor {other.name} stands for one of the base's and does not add up; merge "
                f"each adapter into its model, and the models"
            )
    return adapters


def list_modules(adapters: Sequence[Adapter], where: str) -> list[CombinedModule]:
    """Return the modules of all adapters, by their names; `PlanError` where shapes or ranks do not go together."""
    found: dict[tuple[str, str], list[tuple[int, StoredTensor, StoredTensor, int, float]]] = {}
    for number, adapter in enumerate(adapters):
        for path, parts in adapter.parts.items():
            kind = "embedding_" if any(part.startswith("embedding") for part in parts) else ""
            a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
            half = a or b
            if half is not None and (a is None or b is None):
                raise PlanError(f"{where}: {adapter.ref}: tensor {half.name} is half of a pair; the other is not there")
            if a is None or b is None:
                continue
            rank = adapter.config.find_rank(path)
            if a.shape[0] != rank or b.shape[1] != rank:
                raise PlanError(
                    f"{where}: {adapter.ref}: tensor {a.name} has shape {list(a.shape)}, its other half "
                    f"{list(b.shape)}, and by its config the rank is {rank}"
                )
            found.setdefault((path, kind), []).append((number, a, b, rank, adapter.config.find_scale(path)))
    modules = []
    for (path, kind), having in sorted(found.items()):
        _, a, b, _, _ = having[0]
        for _, other_a, other_b, _, _ in having[1:]:
            if (other_a.shape[1:], other_b.shape[0]) != (a.shape[1:], b.shape[0]):
                raise PlanError(
                    f"{where}: module {path}: {other_a.name} has shape {list(other_a.shape)} and another adapter's "
                    f"{list(a.shape)}; are they of one base?"
                )
        modules.append(CombinedModule(path, kind, tuple(having), prod(a.shape[1:]), b.shape[0]))
    return modules

"""Models with adapters: both opened, and one checkpoint made of them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from mergemill.engine.checkpoint.checkpoint import Checkpoint
from mergemill.engine.recipe import ModelRef
from mergemill.engine.storage.store import Storage

if TYPE_CHECKING:  # without adapters, nothing of them is imported
    from mergemill.engine.checkpoint.adapter import Adapter

ADAPTERS_AT_ONCE = 8  # that are opened

Place = tuple[str, str | None]  # a path and a revision


def open_adapters(refs: Mapping[str, ModelRef], storage: Storage) -> "Mapping[Place, Adapter]":
    """Open the adapters of all models at once."""
    places = list(dict.fromkeys((each.path, each.revision) for ref in refs.values() for each, _ in ref.list_adapters()))
    if not places:
        return {}
    from mergemill.engine.checkpoint.adapter import open_adapter

    with ThreadPoolExecutor(min(len(places), ADAPTERS_AT_ONCE)) as pool:
        opened = pool.map(lambda place: open_adapter(place[0], place[1], storage), places)
        return dict(zip(places, opened, strict=True))


def apply_adapters(
    refs: Mapping[str, ModelRef], models: Mapping[str, Checkpoint], adapters: "Mapping[Place, Adapter]"
) -> Mapping[str, Checkpoint]:
    """Return the models of `refs` with their adapters."""
    return {name: _apply(name, ref, models[name], adapters) for name, ref in refs.items()}


def warn_of_bases(refs: Mapping[str, ModelRef], adapters: "Mapping[Place, Adapter]", *, where: str) -> list[str]:
    """Return a warning for each adapter that was trained on a model of another name than the one it is put onto."""
    return [
        f"{where}: {each.path} was trained on {base!r}, and is put onto {ref.path}; are they the same model?"
        for ref in refs.values()
        for each, _ in ref.list_adapters()
        if _is_another(base := adapters[each.path, each.revision].config.base, ref.path)
    ]


def _apply(name: str, ref: ModelRef, model: Checkpoint, adapters: "Mapping[Place, Adapter]") -> Checkpoint:
    given = [(adapters[each.path, each.revision], weight) for each, weight in ref.list_adapters()]
    if not given:
        return model
    from mergemill.engine.checkpoint.adapted import add_adapters

    return add_adapters(model, given, name)


def _is_another(base: str, path: str) -> bool:
    """Whether two names of a model differ in their last parts; an adapter that names none may be anybody's."""
    return bool(base) and _last(base) != _last(path)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()

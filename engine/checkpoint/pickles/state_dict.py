"""Which of what a file of ``torch.save`` holds are the tensors of a model, and under which names.

A dictionary of tensors is one as it is. Where trainers saved more, the tensors are under one of a few keys; what else
there is, an optimizer's state above all, is left out and named. Of several such keys none is guessed: ``file.pt#ema``
chooses, by keys with dots between them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergemill.engine.checkpoint.pickles.names import show
from mergemill.engine.checkpoint.pickles.values import TensorRef, describe
from mergemill.engine.errors import PickledError

KEYS = (
    "state_dict", "model", "model_state_dict", "module", "params", "params_ema", "ema", "generator", "net",
)  # fmt: skip
MOST_DEPTH = 8  # of dictionaries in each other
MOST_NAMED = 10  # in a message

Tensors = Mapping[str, TensorRef]


def find_state_dict(saved: Any, chosen: str, *, where: str) -> tuple[Tensors, Sequence[str]]:
    """Return the tensors by name, and what else there is, by its keys; `chosen` is what follows ``#``."""
    path: list[str] = []
    left: list[str] = []
    for key in _split(saved, chosen, where):
        left += [".".join([*path, each]) for each in _list_keys(saved, where, path) if each != key]
        saved, path = saved[_find_key(saved, key)], [*path, key]
    if not chosen:
        saved, path = _descend(saved, path, left, where)
    tensors = {name: each for name, each in _items(saved, where, path) if isinstance(each, TensorRef)}
    if not tensors:
        raise PickledError(
            f"{where}: holds no tensors{_say_path(path)}; it has {_list(_list_keys(saved, where, path))}"
        )
    left += [".".join([*path, name]) for name, each in _items(saved, where, path) if name not in tensors]
    return tensors, left


def say_left_out(left: Sequence[str], *, where: str) -> str:
    """Say what was left out of a file."""
    return f"{where}: only the tensors of the model are read of it; left out: {_list(left)}"


def _descend(saved: Any, path: list[str], left: list[str], where: str) -> tuple[Any, list[str]]:
    """Follow the keys under which trainers save a model, as far as they lead."""
    for _ in range(MOST_DEPTH):
        items = _items(saved, where, path)
        if any(isinstance(each, TensorRef) and each.shape for _, each in items):
            return saved, path
        found = [name for name, each in items if name in KEYS and _holds_tensors(each, MOST_DEPTH)]
        if not found and (others := [name for name, each in items if _holds_tensors(each, MOST_DEPTH)]):
            raise PickledError(f"{where}: holds tensors under {_list(others)}; say which: {where}#{show(others[0])}")
        if len(found) > 1:
            raise PickledError(f"{where}: holds several models, {_list(found)}; say which: {where}#{show(found[0])}")
        if not found:
            return saved, path
        left += [".".join([*path, name]) for name, _ in items if name != found[0]]
        saved, path = saved[_find_key(saved, found[0])], [*path, found[0]]
    raise PickledError(f"{where}: holds dictionaries in each other, more than {MOST_DEPTH} deep")


def _holds_tensors(value: Any, depth: int) -> bool:
    """Whether a dictionary holds tensors, or dictionaries that do."""
    if not isinstance(value, dict) or not depth:
        return False
    if any(isinstance(each, TensorRef) for each in value.values()):
        return True
    seen = {id(each): each for each in value.values() if isinstance(each, dict)}
    return len(seen) <= MOST_NAMED * 10 and any(_holds_tensors(each, depth - 1) for each in seen.values())


def _split(saved: Any, chosen: str, where: str) -> Sequence[str]:
    """Return the keys that a path with dots means, of which some may have dots themselves."""
    keys: list[str] = []
    rest = chosen
    while rest:
        names = _list_keys(saved, where, keys)
        fits = [name for name in names if rest == name or rest.startswith(f"{name}.")]
        if not fits:
            raise PickledError(f"{where}: has no {show(rest)!r}{_say_path(keys)}; it has {_list(names)}")
        key = max(fits, key=len)
        keys.append(key)
        saved, rest = saved[_find_key(saved, key)], rest[len(key) + 1 :]
    return keys


def _items(saved: Any, where: str, path: Sequence[str]) -> list[tuple[str, Any]]:
    if not isinstance(saved, dict):
        raise PickledError(f"{where}: holds {_describe(saved)}{_say_path(path)}, and no dictionary of tensors")
    items = [(str(key), value) for key, value in saved.items()]
    if len({name for name, _ in items}) < len(items):
        raise PickledError(f"{where}: has a number and a text that are one name{_say_path(path)}")
    return items


def _list_keys(saved: Any, where: str, path: Sequence[str]) -> list[str]:
    return [name for name, _ in _items(saved, where, path)]


def _find_key(saved: dict[Any, Any], name: str) -> Any:
    return next(key for key in saved if str(key) == name)


def _describe(value: Any) -> str:
    return "one tensor" if isinstance(value, TensorRef) else describe(value)


def _say_path(path: Sequence[str]) -> str:
    return f" under {show('.'.join(path))}" if path else ""


def _list(names: Sequence[str]) -> str:
    """Name the first of several, and say how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return (", ".join(show(name) for name in names[:MOST_NAMED]) or "nothing") + more

"""What stands in a pickle machine for what a pickle means: words, storages, tensors by their place, and leftovers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class PickledName:
    """A name that a pickle may ask for; nothing is imported for it."""

    name: str  # "collections.OrderedDict"


@dataclass(frozen=True, slots=True, eq=False)
class Left:
    """What is no tensor and no container of tensors, of which only its kind is known."""

    name: str  # "argparse.Namespace"


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A storage, as a persistent id names it."""

    key: str  # its number, the name of its entry in a zip file
    dtype: str | None  # safetensors' name of it; None: only its bytes count
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor in a storage."""

    storage: StorageRef
    dtype: str  # safetensors' name of it
    offset: int  # of its first element, in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements from one entry of an axis to the next


Value = Any  # what stands on a machine's stack: plain Python values, and those of above


def describe(value: object) -> str:
    """Name a value in a message: never all of it.

    >>> describe(PickledName("torch.Size")), describe([1]), describe("a" * 100)
    ('torch.Size', 'a list', 'a text')
    """
    if isinstance(value, PickledName | Left):
        return value.name
    kinds: dict[type, str] = {
        dict: "a dictionary",
        list: "a list",
        tuple: "a tuple",
        str: "a text",
        bool: "a boolean",
        StorageRef: "a storage",
        TensorRef: "a tensor",
    }
    return kinds.get(type(value), "nothing" if value is None else f"a {type(value).__name__.lower()}")

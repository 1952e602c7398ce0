"""A pickle machine that runs nothing: what a pickle would import or call are words to it. Its opcodes: `opcodes.py`.

Format: https://docs.python.org/3/library/pickletools.html, protocols 0 to 5. A name is looked up in a table of ours
(`names.py`) and is refused there unless it is one of those that tensors, and what trainers keep beside them, are made
of; a call of such a name is answered by a function of ours. Python's own unpickler is not used: its `find_class` guards
imports, but neither `__setstate__` nor the size of memo, stack and numbers (decided 2026-11-29).

What a pickle may take is bounded by the file: opcodes, values made, bytes of a number. Shared values stay shared, and
are never walked here, so that tuples of tuples cost what they take on disk.
"""

from typing import Protocol

from mergemill.engine.checkpoint.pickles.reader import Reader
from mergemill.engine.checkpoint.pickles.values import PickledName, Value
from mergemill.engine.errors import PickledError

MOST_VALUES = 3_000_000  # texts, containers and calls: nine a tensor; and as many places of the memo
MOST_DIGITS = 64  # of a whole number in bytes or digits; Python's take a time that grows with the square


class Rules(Protocol):
    """What names mean; `PickledError` for what they are not to mean."""

    def find(self, module: str, name: str) -> Value:
        """Return what stands for a name."""

    def call(self, named: PickledName, arguments: tuple[Value, ...]) -> Value:
        """Return what a call of a name gives."""

    def load(self, asked: Value) -> Value:
        """Return what stands for a persistent id: a storage."""


class Machine:
    """One pickle on its way from opcodes to a value."""

    def __init__(self, reader: Reader, rules: Rules) -> None:
        self.reader = reader
        self.rules = rules
        self.stack: list[Value] = []
        self.below: list[list[Value]] = []  # what stands under each mark
        self.memo: dict[int, Value] = {}
        self._values = 0

    def refuse(self, why: str) -> PickledError:
        """Return the error for what its pickle does."""
        return PickledError(f"{self.reader.where}: its pickle {why}")

    def push(self, value: Value) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def make(self, value: Value) -> None:
        """Put a value on the stack that was not there before."""
        self.count()
        self.stack.append(value)

    def count(self) -> None:
        """Count what takes memory."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise self.refuse(f"makes more than {MOST_VALUES} values")

    def pop(self) -> Value:
        """Take the last value."""
        if not self.stack:
            raise self.refuse("takes more from its stack than is there")
        return self.stack.pop()

    def top(self) -> Value:
        """Return the last value, which stays."""
        if not self.stack:
            raise self.refuse("takes more from its stack than is there")
        return self.stack[-1]

    def pop_mark(self) -> list[Value]:
        """Take what stands above the last mark, and the mark."""
        if not self.below:
            raise self.refuse("takes a mark that is not there")
        found = self.stack
        self.stack = self.below.pop()
        return found

    def take_number(self, size: int) -> int:
        """Take a number without a sign, of so many bytes."""
        return int.from_bytes(self.reader.take(size), "little")

    def take_word(self) -> int:
        """Take the decimal number of a line."""
        return self.parse_number(self.reader.take_line())

    def parse_number(self, line: bytes) -> int:
        """Return the number that a line is."""
        if len(line) > MOST_DIGITS:
            raise self.refuse(f"has a number of {len(line)} digits")
        try:
            return int(line.removesuffix(b"L"))
        except ValueError:
            raise self.refuse(f"has {line!r} for a number") from None

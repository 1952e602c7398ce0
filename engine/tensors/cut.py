"""Which elements of a tensor are its m largest: what selecting finds, and what trimming and native loops use."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements are the m largest: those above `threshold`, and the first `ties` equal to it."""

    threshold: float
    above: int  # how many elements are larger than the threshold
    ties: int  # how many elements that equal it are kept, the first by index
    block: int  # the block (of the tensor's) in which the last of them lies
    block_ties: int  # how many are kept in that block


@dataclass(frozen=True, slots=True)
class Ranked:
    """The m-th largest of a tensor's values, by its key, and what a cut there is."""

    key: int
    above: int  # how many are larger
    ties: int  # how many that equal it are among the m largest, the first by index
    block: int  # the block (of the tensor's) in which the last of them lies
    block_ties: int  # how many are kept in that block

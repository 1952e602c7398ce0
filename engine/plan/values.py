"""The plan as a value: for every byte of the output, the bytes of the inputs that it needs and the formula for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mergemill.engine.checkpoint.layout import TensorInfo
from mergemill.engine.methods.own import MethodsFile
from mergemill.engine.plan.show import Facts, list_names, show_html, show_text
from mergemill.engine.plan.sizes import format_size, say_count
from mergemill.engine.plan.steps import Scaling
from mergemill.engine.recipe import Guard
from mergemill.engine.storage.ranges import Pin
from mergemill.engine.tensors.expressions import Expression
from mergemill.engine.tensors.slabs import Span


class OutputTensor(NamedTuple):
    """One tensor of the output and what it is made of."""

    name: str
    dtype: str  # as written
    expression: Expression
    most_growth: float | None = (
        None  # beyond which, or where it is not finite, the base is written instead; None: never
    )
    stored_as: tuple[TensorInfo, ...] = ()  # the tensors that its data are in the file, one after the other; none: it
    stem: str = ""  # of the shards that hold it, where they lie in a folder: "unet/diffusion_pytorch_model"

    @property
    def stored_name(self) -> str:
        """Its name in its shard: without the folder of that, which its own begins with."""
        return self.name.removeprefix(f"{self.stem.rpartition('/')[0]}/") if self.stem else self.name

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """What a header says of it."""
        return self.stored_as or (TensorInfo(self.stored_name, self.dtype, self.expression.shape),)


@dataclass(frozen=True, slots=True)
class Projected:
    """What merging a piece takes of a worker, known before it runs (`memory.py` finds it)."""

    slab_bytes: int  # an upper bound of what one slab takes, with what every slab needs whole
    keep_bytes: int  # with the inputs kept from the first pass to the last
    ahead_bytes: int  # that remote ranges of slabs to come may take
    usual_rounds: int  # passes over the whole tensor before it is merged, for nearly every tensor
    most_rounds: int  # at most; 0: one pass does all


class Piece(NamedTuple):
    """Some elements of one output tensor, and where their bytes go."""

    tensor: OutputTensor
    span: Span  # elements
    offset_bytes: int  # in the shard's file
    whole: bool  # whether the span is the whole tensor
    projected: Projected


@dataclass(frozen=True, slots=True)
class Part:
    """The unit of work, retry, progress and resume: a contiguous range of one shard."""

    number: int  # in the plan
    shard: int  # index of the shard
    start_bytes: int  # in the shard's file
    stop_bytes: int
    pieces: tuple[Piece, ...]  # in the order of their bytes, without holes

    @property
    def size_bytes(self) -> int:
        """What the part writes."""
        return self.stop_bytes - self.start_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the output."""

    name: str
    header: bytes  # everything before the data
    size_bytes: int  # of the whole file
    tensors: tuple[str, ...]  # in the order of their data


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file beside the shards: made here (`data`) or copied byte for byte (`copied`)."""

    name: str
    data: bytes | None
    copied: Pin | None


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What a merge takes from one model."""

    model: str  # as the recipe writes it
    path: str
    tensors: int  # stored in the model
    merged: int  # of those: read by a method
    copied: int  # of those: copied as they are
    dropped: Mapping[str, int]  # of those: not used, by the rule that says so
    read_bytes: int  # when every input is read once
    is_stage: bool = False  # whether the model is a stage, of which nothing is stored


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token of the output whose row some input is given by a rule, or by the recipe."""

    tensor: str
    token: str
    number: int  # its id
    forced: bool  # whether every input is given the row
    nobody: bool  # whether no model has one, so that it is zeros
    rows: tuple[tuple[str, int], ...]  # the model and the row there, or those of which it is the mean; none: zeros
    lacking: tuple[str, ...]  # the inputs that have none of their own
    approximated: str = ""  # how their rows are made of their own ones, after the other model's


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """What becomes of the tokens of a merge's models."""

    source: str = ""  # the model whose vocabulary it is
    added: tuple[tuple[str, int], ...] = ()  # tokens that the source lacks, and their ids
    marked: tuple[tuple[str, int, str], ...] = ()  # those of the source that become added ones, and who adds them
    rows: tuple[TokenRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """What a plan is made from, so that it can be told, and made again."""

    kind: str  # of the planner, as `planners.py` knows it
    title: str  # for people: of a merge, its method
    value: Mapping[str, Any]  # canonical, as JSON: it goes into the digest
    text: str = ""  # as the user wrote it
    name: str = ""  # of its file
    seed: int = 0  # of random numbers
    code: tuple[MethodsFile, ...] = ()  # files of the user's own methods


class Beforehand(Protocol):
    """What one task computes before the parts that need it: the gates of a mixture (`gates.py`)."""

    @property
    def pins(self) -> Iterator[Pin]:
        """Yield every file that it reads."""

    def check_memory(self, memory_bytes: int) -> None:
        """Raise `PlanError` with the number that would do where a worker has too little."""

    def describe(self) -> Mapping[str, Any]:
        """Return its numbers, as JSON."""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """A merge that is ready to run."""

    digest: str  # sha256 over all that the output's bytes depend on, and the cut into parts
    origin: Origin
    shard_size: str  # as given: bytes or "tensor"
    shards: tuple[Shard, ...]
    parts: tuple[Part, ...]
    files: tuple[SmallFile, ...]  # in the order in which they are written; the last makes it an output
    sources: tuple[SourceUse, ...]
    pins: tuple[Pin, ...]  # every file that is read
    donor: str  # whose config and tokenizer the output has, and why
    dtype_from: str  # why the tensors have their dtypes
    guard: Guard  # what happens to tensors that come out broken
    storage: Mapping[str, Mapping[str, Any]]  # options of storage that the origin gives
    scaling: Scaling | None  # factors on task vectors that can only be known from all weights
    warnings: tuple[str, ...]
    tokens: OutputTokens | None = None  # what becomes of tokens, where a recipe says how the vocabulary is made
    gates: Beforehand | None = None  # what routers are computed from, before the parts that write them

    @property
    def write_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def read_bytes(self) -> int:
        """What is read of all sources when every input is read once."""
        return sum(source.read_bytes for source in self.sources)

    @property
    def tensors(self) -> int:
        """The number of output tensors."""
        return sum(len(shard.tensors) for shard in self.shards)

    def __repr__(self) -> str:
        return show_text(*self._show())

    def _repr_html_(self) -> str:
        return show_html(*self._show())

    def _show(self) -> tuple[str, Facts]:
        warnings = f"{len(self.warnings)}: {self.warnings[0]}" if self.warnings else "none"
        shards = f"{len(self.shards):,} of at most {self.shard_size}"
        tensors, parts = say_count(self.tensors, "tensor"), say_count(len(self.parts), "part")
        models = [source.model for source in self.sources if not source.is_stage]
        return f"Plan: {self.origin.title}", (
            ("models", f"{len(models)}: {list_names(models)}"),
            ("read", format_size(self.read_bytes)),
            ("write", f"{format_size(self.write_bytes)}: {tensors} in {parts}"),
            ("shards", shards),
            ("seed", str(self.origin.seed)),
            ("warnings", warnings),
            ("digest", self.digest[:12]),
        )

"""What a run is asked beside its plan and its place: one value, and the same as keywords."""

from dataclasses import dataclass

from mergemill.engine.runs.events import OnEvent, ignore
from mergemill.engine.runs.worker.options import WorkerKeywords, WorkerOptions
from mergemill.engine.tensors.slabs import SLAB


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(WorkerOptions):
    """What is asked of the workers, see `WorkerOptions`, and of this process.

    public: everybody sees a repository that is made on the Hub, which is else private. overwrite: a finished merge that
    is in the output, with nothing else, is replaced, see `outputs.replaced`. progress: show a bar, in a terminal or a
    notebook, and lines elsewhere. on_event: is called in this thread. resume: the command that repeats
    this from any directory, for `status`. slab: the elements of one step of a merge, which change no byte.
    """

    public: bool = False
    overwrite: bool = False
    progress: bool = False
    on_event: OnEvent = ignore
    resume: str = ""
    slab: int = SLAB


class RunKeywords(WorkerKeywords, total=False):
    """`RunOptions` as keywords of a function."""

    public: bool
    overwrite: bool
    progress: bool
    on_event: OnEvent
    resume: str
    slab: int

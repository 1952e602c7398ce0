"""Every error that mergemill raises on purpose.

::

    MergemillError                 exit  what went wrong
    ├── InputError                    2  what the user gave; found before anything is written
    │   ├── RecipeError                  the YAML of a recipe or cluster: where, what, what would be right
    │   ├── CheckpointError              a stored model
    │   │   ├── Absent                   its storage was asked, and says that nothing is there
    │   │   ├── HeaderError              a safetensors file that breaks the format
    │   │   ├── PickledError             a file of torch.save that is damaged, or asks for more than tensors
    │   │   └── IndexFileError           a model.safetensors.index.json that does not fit its shards
    │   ├── MethodsError                 a file of methods: it cannot be read or run, or holds none
    │   ├── PlanError                    recipe and checkpoints do not go together
    │   └── OutputError                  the output folder holds something else, or cannot be written
    ├── UnfitSystem                   2  mergemill does not run on this system; an ImportError too
    ├── Cancelled                   130  somebody asked for the merge to end; it can be resumed
    └── RunError                      1  the work itself
        ├── ClusterError                 the Dask cluster is not there, or its workers cannot do the merge
        ├── SourceChanged                an input is no longer what the plan saw
        ├── StorageError                 reading or writing failed: disk full, file gone, permission
        ├── MergeError                   the tensors themselves cannot be merged
        └── VerifyError                  an output that does not match its receipts

A message says where, what is wrong and what would be right, in one line.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileFault:
    """One of the things that are wrong in a file."""

    words: str  # what is wrong, and what would be right
    line: int  # counted from 1
    text: str  # the line, as the file has it
    column: int  # counted from 0: where what is wrong begins
    width: int  # columns of it


class MergemillError(Exception):
    """Base of everything here; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(MergemillError):
    """The recipe, its inputs or the output's place are wrong; nothing has been written.

    faults: all that is wrong in a file, by line; none where the fault is at no place of a file of ours.
    """

    exit_code = 2

    def __init__(self, message: str = "", faults: tuple[FileFault, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class UnfitSystem(MergemillError, ImportError):
    """The system lacks what the engine stands on, or holds a native library that was built from other sources."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe, or the cluster file, is not valid: the message begins with ``file:line:``."""


class CheckpointError(InputError):
    """A model cannot be opened or is not whole."""


class Absent(CheckpointError):
    """Nothing is there: its storage was asked, and said so. One that cannot be reached or read is no such error."""


class HeaderError(CheckpointError):
    """A safetensors file breaks the format."""


class PickledError(CheckpointError):
    """A file of ``torch.save`` breaks its format, or asks for what is no part of a tensor; nothing of it was run."""


class IndexFileError(CheckpointError):
    """An index names shards or tensors that are not there."""


class MethodsError(InputError):
    """A user's file of methods cannot be read or run, or holds none."""


class PlanError(InputError):
    """The recipe and the checkpoints do not go together."""


class OutputError(InputError):
    """The output's place holds something else, or cannot be written."""


class Cancelled(MergemillError):
    """Somebody asked for the merge to end, by `cancel`; it can be resumed."""

    exit_code = 130


class RunError(MergemillError):
    """A merge that began could not go on; it can be resumed."""


class ClusterError(RunError):
    """A Dask cluster does not answer, has no workers, or has some that cannot do the merge."""


class SourceChanged(RunError):
    """An input differs from what the plan was made from."""


class StorageError(RunError):
    """Reading or writing failed."""


class MergeError(RunError):
    """The values of the tensors do not allow the merge."""


class VerifyError(RunError):
    """An output does not match its receipts or its plan."""

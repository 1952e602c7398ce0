"""What lies in ``.mergemill`` beside an output, and how mergemill's own files there are told from anybody else's."""

import re
from collections.abc import Iterable

from mergemill.engine.checkpoint.unfinished import STATE_NAME
from mergemill.engine.errors import OutputError
from mergemill.engine.runs.outputs.record import Record

RECORD_NAME, LOCK_NAME = f"{STATE_NAME}/plan.json", f"{STATE_NAME}/lock"
JOURNAL_NAME = f"{STATE_NAME}/journal.jsonl"  # of a folder; objects have one of many

_NOTES = re.compile(
    r"(plan\.json|journal\.jsonl?|journal/\d{20}-[0-9a-f]{8}\.json|committed|lock|driver\.json|cancel|uploads\.json"
    r"|gates\.json|gates\.safetensors)"
    r"(\.[0-9a-f]{8})?"  # of a storage that is asked for its time by writing something
    r"|object\.tmp-[0-9a-f]{4,8}"
    r"|\.[^/]+\.tmp-[0-9a-f]{8}"  # small files, half written
    r"|\.(plan\.json|driver\.json|cancel|gates\.json|gates\.safetensors)\.tmp"  # and notes
)
_SHARD = re.compile(r"(?P<name>[^/]+)\.tmp-[0-9a-f]{4,12}")
_NAMED = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")  # as shards are, where no plan can be asked


def flatten_name(shard_name: str) -> str:
    """Return what an unfinished shard is called in the state folder, which has no folders.

    >>> flatten_name("unet/model.safetensors")
    'unet%2Fmodel.safetensors'
    """
    return shard_name.replace("/", "%2F")


def is_own(name: str, record: Record | None) -> bool:
    """Whether a merge, that of `record` where there is one, gives such a name to a file in its state folder.

    >>> is_own("journal.jsonl", None), is_own("model-00001-of-00002.safetensors.tmp-0123456789ab", None)
    (True, True)
    >>> is_own("thesis.tex", None), is_own("thesis.tex.tmp-0123456789ab", None)
    (False, False)
    """
    if _NOTES.fullmatch(name):
        return True
    shard = _SHARD.fullmatch(name)
    return shard is not None and is_shard(shard["name"].replace("%2F", "/"), record)


def is_shard(name: str, record: Record | None) -> bool:
    """Whether a file's name is that of a shard: of the merge of `record`, or where no plan can be asked, of any."""
    return name in record.shards if record else bool(_NAMED.fullmatch(name))


def check_own(names: Iterable[str], record: Record | None, where: str) -> None:
    """Raise `OutputError` for a state folder with another's file in it, unless a plan shows whose folder it is."""
    if record is None and (foreign := [name for name in names if not is_own(name, None)]):
        raise OutputError(
            f"{where}: its {STATE_NAME} holds {foreign[0]!r} and no plan of a merge, so it is not taken for one of "
            "mergemill's; move it away, or choose another folder"
        )

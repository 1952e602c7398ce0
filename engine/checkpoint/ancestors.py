"""The family tree of a model, as far as cards tell: its base models, theirs, and the licence of each.

A card says in its front matter what it was made from (``base_model``) and how (``base_model_relation``); an adapter
says it in its config too. Nothing but cards is read, of a bounded number of models, and never by a plan: each is a
request to storage. A card is anybody's: what it names is looked for on the Hub alone, and never on this machine.
Format: https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mergemill.engine.checkpoint.checkpoint import HUB_NAME, resolve
from mergemill.engine.checkpoint.terms import CARD_NAME, read_front
from mergemill.engine.errors import CheckpointError, RunError
from mergemill.engine.storage.bounds import CARD_BYTES
from mergemill.engine.storage.ranges import list_files, read_beginning
from mergemill.engine.storage.store import Storage

MOST_ANCESTORS = 64  # that are looked for
AT_ONCE = 8  # cards that are read


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a model's card says of it."""

    name: str
    license: str = ""  # as the card says it; empty where it says none
    relation: str = ""  # to its bases: finetune, merge, adapter, quantized
    bases: tuple[str, ...] = ()
    unread: str = ""  # why there is no card


def read_lineage(name: str, text: str) -> Lineage:
    """Return what the text of a card says of the model `name`.

    >>> card = "---\\nlicense: mit\\nbase_model: [org/a, org/b]\\nbase_model_relation: merge\\n---\\n"
    >>> read_lineage("me/c", card)
    Lineage(name='me/c', license='mit', relation='merge', bases=('org/a', 'org/b'), unread='')
    """
    front = read_front(text)
    said = front.get("license", ())
    named = front.get("license_name", ())
    license_ = named[0] if said == ("other",) and named else " ".join(said)
    return Lineage(name, license_, " ".join(front.get("base_model_relation", ())), front.get("base_model", ()))


def find_ancestors(bases: Sequence[str], storage: Storage) -> Mapping[str, Lineage]:
    """Return the lineage of `bases`, of their bases and so on, by name, nearest first; each name is read once."""
    found: dict[str, Lineage] = {}
    asked = list(dict.fromkeys(bases))
    while asked and len(found) < MOST_ANCESTORS:
        asked = asked[: MOST_ANCESTORS - len(found)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found |= zip(asked, pool.map(lambda name: _find_lineage(name, storage), asked), strict=True)
        asked = [base for name in asked for base in found[name].bases]
        asked = [name for name in dict.fromkeys(asked) if name not in found]
    return found


def _find_lineage(name: str, storage: Storage) -> Lineage:
    if not HUB_NAME.fullmatch(name):
        return Lineage(name, unread="is no name of a model on the Hub")
    try:
        files = list_files(resolve(f"hf://{name}", None, storage), "", storage) or {}
        if CARD_NAME not in files:
            return Lineage(name, unread="has no card")
        text = read_beginning(files[CARD_NAME], CARD_BYTES, storage).decode(errors="replace")
    except (CheckpointError, RunError, OSError) as error:
        return Lineage(name, unread=" ".join(str(error).split("\n")))
    return read_lineage(name, text)

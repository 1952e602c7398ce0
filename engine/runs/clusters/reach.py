"""What a worker reaches of remote storage: asked of each before a merge, once for every bucket or repository."""

from collections.abc import Iterable, Sequence

from mergemill.engine.errors import Absent, MergemillError
from mergemill.engine.storage.pin import Pin
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.storage.store import Storage, Unavailable, store_of


def choose_samples(pins: Iterable[Pin]) -> tuple[Pin, ...]:
    """Return one file of each bucket, repository or host that is read."""
    return tuple({_find_place(pin.url): pin for pin in pins if is_remote(pin.url) and pin.size_bytes}.values())


def find_unreached(samples: Sequence[Pin], out: str, storage: Storage) -> dict[str, str]:
    """Return what keeps this process from reading `samples` or listing `out`, by URL; it says no secret.

    What may pass, such as a server that is busy, is left to the merge, which asks again. storage: how it is reached.
    """
    faults = {}
    for url, pin in {**{pin.url: pin for pin in samples}, **({out: None} if out else {})}.items():
        try:
            if pin is None:
                store_of(out, storage).list_files(out, "")
            else:
                store_of(url, storage).read_some(pin, 0, memoryview(bytearray(1)))
        except Unavailable:
            continue
        except Absent as error:
            if pin is not None:  # an output may be new
                faults[url] = str(error)
        except MergemillError as error:
            faults[url] = str(error)
    return faults


def _find_place(url: str) -> str:
    """Return what one right to read holds for.

    >>> _find_place("s3://models/a/model.safetensors"), _find_place("hf://org/name@0123abc/model.safetensors")
    ('s3://models', 'hf://org/name@0123abc')
    """
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{'/'.join(rest.split('/')[: 2 if scheme == 'hf' else 1])}"

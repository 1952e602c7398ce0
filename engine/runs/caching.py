"""The cache that a run is asked for: checked before anything is written, and out of the output's way."""

from pathlib import Path

from mergemill.engine.errors import InputError
from mergemill.engine.plan.sizes import format_size, parse_size
from mergemill.engine.storage.cache import LEAST_BYTES, SPARE_BYTES, CacheOptions, make_cache_folder
from mergemill.engine.storage.ranges import is_remote
from mergemill.engine.storage.urls import parse_path


def choose_cache(
    cache: str | int | None, folder: str | Path | None, out: str | Path, write_bytes: int, *, here: bool
) -> CacheOptions | None:
    """Return the cache for a merge that writes `write_bytes` to `out`; None where none is asked for.

    here: whether the workers run on this machine, where the folder is then made; `InputError` where it cannot be. On a
    disk that the output goes to as well the cache leaves room for all of it.
    """
    if cache is None:
        if folder is not None:
            raise InputError("--cache-folder is of no use without --cache SIZE; say how large the cache may grow")
        return None
    options = CacheOptions(_parse_limit(cache), None if folder is None else str(_parse_folder(folder)))
    if not here:
        return options
    place = options.find_folder()
    make_cache_folder(place)
    beside = not is_remote(str(out)) and _find_disk(Path(out)) == _find_disk(place)
    return CacheOptions(options.limit_bytes, options.folder, SPARE_BYTES + (write_bytes if beside else 0))


def _parse_folder(folder: str | Path) -> Path:
    return parse_path(folder, InputError, what="a cache").absolute()


def _parse_limit(cache: str | int) -> int:
    limit_bytes = parse_size(cache, what="--cache")
    if limit_bytes < LEAST_BYTES:
        raise InputError(
            f"--cache {cache}: {limit_bytes} bytes hold next to nothing, {format_size(LEAST_BYTES)} are the least; "
            f"write a number with MB, GB, MiB or GiB, such as 50GB"
        )
    return limit_bytes


def _find_disk(path: Path) -> int:
    """Return the disk that a path is on, or will be."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return existing.stat().st_dev

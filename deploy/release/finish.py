"""Finish what was built for a release: ``python deploy/release/finish.py FILE… --into FOLDER [--any]``.

The native loops are loaded by ctypes and know nothing of Python, so one wheel serves every version of it: its tags
become ``py3-none-PLATFORM``, and with ``--any``, of a wheel built without a compiler, ``py3-none-any``. In the long
description links become absolute, since a page of the package index has no files beside it; the README's own stay
relative, as readers of the folder want them. By a script of the standard library and not by a build backend of ours
(2026-11-30): who installs from the folder needs none of it, and what pip builds is plain setuptools.

Formats: https://packaging.python.org/en/latest/specifications/binary-distribution-format/ and core-metadata.
"""

import argparse
import base64
import hashlib
import io
import re
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def main() -> None:
    """Finish wheels and source distributions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--any", action="store_true", help="of a wheel without native loops")
    asked = parser.parse_args()
    asked.into.mkdir(parents=True, exist_ok=True)
    for path in asked.files:
        made = (
            finish_wheel(path, asked.into, pure=asked.any) if path.suffix == ".whl" else finish_sdist(path, asked.into)
        )
        print(made)  # noqa: T201 - a script


def make_absolute(text: str, repository: str) -> str:
    """Return a text in Markdown whose links within the project lead to its pages on the web.

    >>> make_absolute("[a](engine/README.md#words), [b](#c), [d](https://e)", "https://x/y")
    '[a](https://x/y/blob/main/engine/README.md#words), [b](#c), [d](https://e)'
    """
    return _LINK.sub(lambda found: f"]({repository}/blob/main/{found[1]})", text)


def find_repository() -> str:
    """Return the project's address, as pyproject.toml says it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Source"])


def finish_wheel(path: Path, into: Path, *, pure: bool) -> Path:
    """Write the wheel with its new tags and description; returns where."""
    name, version, _, _, platform = path.stem.split("-")
    tags = ["any"] if pure else platform.split(".")
    with zipfile.ZipFile(path) as wheel:
        entries = {entry.filename: (entry, wheel.read(entry)) for entry in wheel.infolist()}
    if pure and (libraries := [name for name in entries if name.endswith((".so", ".dylib"))]):
        raise SystemExit(f"{path}: has {libraries[0]}, so it is not for any platform")
    about = f"{name}-{version}.dist-info"
    changed = {
        f"{about}/METADATA": make_absolute(entries[f"{about}/METADATA"][1].decode(), find_repository()).encode(),
        f"{about}/WHEEL": _retag(entries[f"{about}/WHEEL"][1].decode(), tags).encode(),
    }
    files = {name: changed.get(name, data) for name, (_, data) in entries.items()}
    files[f"{about}/RECORD"] = _write_record(files, f"{about}/RECORD")
    made = into / f"{name}-{version}-py3-none-{'.'.join(tags)}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(entries[name][0], data, zipfile.ZIP_DEFLATED)
    return made


def _retag(text: str, platforms: list[str]) -> str:
    """Return a WHEEL file that says the tags of its wheel's name."""
    kept = [line for line in text.splitlines() if line and not line.startswith("Tag:")]
    return "\n".join([*kept, *(f"Tag: py3-none-{platform}" for platform in platforms)]) + "\n"


def _write_record(files: Mapping[str, bytes], name: str) -> bytes:
    """Return the list of the files with their checksums; it has none of itself."""
    lines = [f"{each},{_say_sum(data)},{len(data)}" for each, data in files.items() if each != name]
    return "\n".join([*lines, f"{name},,", ""]).encode()


def _say_sum(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def finish_sdist(path: Path, into: Path) -> Path:
    """Write the source distribution with absolute links in its description; returns where."""
    made = into / path.name
    with tarfile.open(path, "r:gz") as given, tarfile.open(made, "w:gz", format=tarfile.PAX_FORMAT) as written:
        for entry in given.getmembers():
            file = given.extractfile(entry)
            data = file.read() if file else b""
            if PurePosixPath(entry.name).name == "PKG-INFO":
                data = make_absolute(data.decode(), find_repository()).encode()
                entry.size = len(data)
            written.addfile(entry, io.BytesIO(data) if file else None)
    return made


if __name__ == "__main__":
    main()

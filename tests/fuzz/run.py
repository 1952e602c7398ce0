"""Targets, fuzzed for some time each: ``python tests/fuzz/run.py header --seconds 600``, with the extra ``fuzz``.

It begins with the corpus that is kept; what reaches new code goes to the folder ``--found``. A finding ends it with
another code than 0, and lies in the working directory as ``crash-…``, ``timeout-…`` or ``oom-…``.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # so that this folder is a package here, as it is in the tests

import atheris  # noqa: E402

with atheris.instrument_imports(include=["mergemill.engine", "mergemill.cli", "yaml"]):
    from fuzz.targets import TARGETS, try_target
from fuzz.mutations import mutate  # noqa: E402

MOST_BYTES = 1 << 16
MEMORY = Path("/dev/shm")
CORPUS = Path(__file__).parent / "corpus"
OPTIONS = ("-timeout=20", "-rss_limit_mb=3000", f"-max_len={MOST_BYTES}", "-len_control=0", "-print_final_stats=1")


def main() -> int:
    """Fuzz what the command line says, each in a process of its own: libFuzzer ends the one that it runs in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, help="of each")
    parser.add_argument("--found", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as spare:
        for name in asked.names:
            found = asked.found or Path(spare, f"found-{name}")
            found.mkdir(parents=True, exist_ok=True)
            child = os.fork()
            if not child:
                tempfile.tempdir = spare
                fuzz(name, asked.seconds, found)
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                return code
    return 0


def fuzz(name: str, seconds: int, found: Path) -> None:
    """Fuzz a target; does not return."""
    options = [*OPTIONS, f"-max_total_time={seconds}"]
    if TARGETS[name].words:  # libFuzzer takes no empty dictionary
        words = Path(tempfile.gettempdir(), "words")
        words.write_text("".join(f'"{_escape(word)}"\n' for word in TARGETS[name].words))
        options.append(f"-dict={words}")
    atheris.Setup(
        [sys.argv[0], *options, str(found), str(CORPUS / name)],
        lambda data: try_target(name, data),
        custom_mutator=_mutate,
    )
    atheris.Fuzz()


def _mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
    """Change half of all by libFuzzer's ways, half by those that know what is fuzzed."""
    changed = mutate(data, seed) if seed % 2 else bytes(atheris.Mutate(data, most_bytes))
    return changed[:most_bytes]


def _escape(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    sys.exit(main())

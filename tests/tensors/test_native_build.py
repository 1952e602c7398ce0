"""The loops' C: clean for two compilers and other machines, sound under sanitizers, and of the version that it says."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mergemill.engine.errors import UnfitSystem
from mergemill.engine.tensors import native, structures

HERE = Path(__file__).parent
TENSORS = HERE.parents[1] / "engine" / "tensors"
EXTENSION = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
SOURCES = [HERE.parents[1] / name for name in EXTENSION["sources"]]
FUZZ_S = float(os.environ.get("MERGEMILL_FUZZ_S", "3"))
SIGNATURES = "45574694c03084da"  # of version 20


def find_compiler(name: str) -> str:
    """Return where it is; where it is missing the test is skipped, but for the CI's gcc."""
    found = shutil.which(name)
    if found is None and (name != "gcc" or os.environ.get("CI") != "true"):
        pytest.skip(f"there is no {name} here")
    assert found is not None, f"the CI has no {name}"
    return found


def compile_loops(compiler: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [find_compiler(compiler), *EXTENSION["extra-compile-args"], "-Wall", "-Wextra", "-Werror", *flags]
    return subprocess.run([*command, *map(str, SOURCES)], capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_compiler_warns(compiler: str, tmp_path: Path) -> None:
    done = compile_loops(compiler, "-fPIC", "-shared", "-o", str(tmp_path / "native.so"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "arm64-apple-darwin"])
def test_other_machines_compile_it(target: str, tmp_path: Path) -> None:
    """Without that machine's headers: the few names that are needed of them are declared here."""
    names = {
        "string.h": "void *memcpy(void *, const void *, size_t); void *memset(void *, int, size_t);"
        "void *memmove(void *, const void *, size_t);",
        "math.h": "double fabs(double); float fabsf(float); double sqrt(double);double floor(double);",
        "stdlib.h": "void *malloc(size_t); void *calloc(size_t, size_t); void *aligned_alloc(size_t, size_t);"
        "void free(void *); void qsort(void *, size_t, size_t, int (*)(const void *, const void *));",
        "errno.h": "extern int errno;\n#define EINTR 4\n#define EIO 5",
        "unistd.h": "typedef long ssize_t, off_t; ssize_t pread(int, void *, size_t, off_t);",
        "sys/uio.h": "",
        "fcntl.h": "",
    }
    for name, text in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#include <stddef.h>\n{text}\n")
    done = compile_loops("clang", "-fsyntax-only", "-ffreestanding", "-target", target, "-isystem", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_another_machine_of_large_endings_is_refused_by_the_compiler(tmp_path: Path) -> None:
    done = compile_loops("gcc", "-fsyntax-only", "-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__")
    assert "checkpoints are little-endian" in done.stderr


def test_random_bits_end_no_loop(tmp_path: Path) -> None:
    """Under the address sanitizer and that of undefined behaviour, for MERGEMILL_FUZZ_S seconds (3)."""
    library = tmp_path / "native.so"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fPIC", "-shared"]
    done = compile_loops("gcc", *flags, "-o", str(library))
    assert done.returncode == 0, done.stderr
    ask = [find_compiler("gcc"), "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": sanitizer, "ASAN_OPTIONS": "detect_leaks=0"}
    seed = int.from_bytes(os.urandom(3), "little")
    command = [sys.executable, str(HERE / "native_fuzz.py"), str(library), str(FUZZ_S), str(seed)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "calls" in found.stdout


def test_another_signature_or_structure_is_another_version() -> None:
    """Where this fails, count VERSION up in native.h and structures.py, and put the digest here that it shows."""
    text = "".join(path.read_text() for path in [*SOURCES, TENSORS / "slab.h"])
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(
        r"\b\w+ mergemill_\w+\([^)]*\)"
        r"|typedef struct \{[^}]*\} (?:Derived|Slab|Cut|Keep|Join|Window|Rank|Codes|Coded|Factor|Adapted);",
        text,
    )
    assert len(found) == len(native.SIGNATURES) + 1 + 11
    plain = "\n".join(" ".join(each.split()) for each in found)
    assert (structures.VERSION, hashlib.sha256(plain.encode()).hexdigest()[:16]) == (20, SIGNATURES)


@pytest.mark.skipif(native.load() is None, reason="the native loops were not built: there is no C compiler")
def test_a_library_of_other_structures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.load()._name  # type: ignore[union-attr]
    library = ctypes.CDLL(path)
    assert native.declare(library, path) is library
    for layout in ((0, *structures.find_layout()[1:]), structures.find_layout()[:-1], (*structures.find_layout(), 8)):
        monkeypatch.setattr(native, "find_layout", lambda layout=layout: layout)
        with pytest.raises(UnfitSystem, match=r"was built from other sources .*; install mergemill again"):
            native.declare(library, path)

"""The floor of a merge: read every input into one reused buffer, write as many bytes as the output has, sync them.

    python floor.py TARGET BYTES SOURCE…

Nothing else is done, so no merge that reads all of its inputs and syncs its output can be faster without reading and
writing at the same time. Prints what reading and writing took, as JSON. It needs the standard library alone.
"""

import json
import os
import sys
import time

BUFFER_BYTES = 8 << 20


def main() -> None:
    """Read the sources, then write the target."""
    target, size, *sources = sys.argv[1:]
    buffer = memoryview(bytearray(BUFFER_BYTES))
    started = time.perf_counter()
    read_bytes = sum(read(source, buffer) for source in sources)
    read_s = time.perf_counter() - started
    write(target, int(size), buffer)
    write_s = time.perf_counter() - started - read_s
    found = {"read_bytes": read_bytes, "read_s": read_s, "written_bytes": int(size), "write_s": write_s}
    sys.stdout.write(json.dumps(found) + "\n")


def read(source: str, buffer: memoryview) -> int:
    """Read a file to its end; returns its bytes."""
    read_bytes = 0
    file = os.open(source, os.O_RDONLY)
    while got := os.readv(file, [buffer]):
        read_bytes += got
    os.close(file)
    return read_bytes


def write(target: str, size: int, buffer: memoryview) -> None:
    """Write `size` bytes and wait until the disk has them."""
    file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    while size:
        size -= os.write(file, buffer[: min(len(buffer), size)])
    os.fdatasync(file)
    os.close(file)


if __name__ == "__main__":
    main()

"""The floor of a merge: read every input into reused buffers, write as many bytes as the output has, sync them.

    python floor.py after|beside|uring TARGET BYTES SOURCE…

Nothing else is done, so no merge that reads all of its inputs and syncs its output can be faster: `after`, unless it
reads and writes at the same time; `beside` and `uring`, which do, two threads or the kernel by itself (io_uring, with
eight reads and writes on their way), at all. Prints what that took, as JSON. But for `uring`, which needs the package
`liburing`, it needs the standard library alone.
"""

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

BUFFER_BYTES = 8 << 20
DEPTH = 8  # reads and writes that io_uring has on their way
PIECE_BYTES = 1 << 20  # of each of these


def main() -> None:
    """Read the sources and write the target."""
    how, target, size, *sources = sys.argv[1:]
    ways: dict[str, Callable[[str, int, Sequence[str]], dict[str, float]]] = {
        "after": go_after,
        "beside": go_beside,
        "uring": go_uring,
    }
    sys.stdout.write(json.dumps(ways[how](target, int(size), sources)) + "\n")


def go_after(target: str, size: int, sources: Sequence[str]) -> dict[str, float]:
    """Write when all is read."""
    buffer = make_buffer()
    started = time.perf_counter()
    read_bytes = sum(read(source, buffer) for source in sources)
    read_s = time.perf_counter() - started
    write(target, size, buffer)
    write_s = time.perf_counter() - started - read_s
    return {"read_bytes": read_bytes, "read_s": read_s, "written_bytes": size, "write_s": write_s}


def go_beside(target: str, size: int, sources: Sequence[str]) -> dict[str, float]:
    """Read by one thread, while another one writes."""
    started, found = time.perf_counter(), {"read_bytes": 0.0, "written_bytes": float(size)}

    def read_all() -> None:
        buffer = make_buffer()
        found["read_bytes"] = float(sum(read(source, buffer) for source in sources))
        found["read_s"] = time.perf_counter() - started

    reader = threading.Thread(target=read_all)
    reader.start()
    write(target, size, make_buffer())
    found["write_s"] = time.perf_counter() - started
    reader.join()
    return found


def go_uring(target: str, size: int, sources: Sequence[str]) -> dict[str, float]:
    """Have the kernel read and write, each piece as soon as a buffer is free."""
    import liburing as uring  # noqa: PLC0415, RUF100

    started, files = time.perf_counter(), [os.open(source, os.O_RDONLY) for source in sources]
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    asked = weave(list(cut_files(files)), [(out, at, length) for at, length in cut(size)])
    buffers = [bytearray(PIECE_BYTES) for _ in range(DEPTH)]
    free, lengths, read_bytes = list(range(DEPTH)), [0] * DEPTH, 0
    ring, cqe = uring.Ring(), uring.Cqe()
    uring.io_uring_queue_init(DEPTH, ring)
    while True:
        while free and (piece := next(asked, None)) is not None:
            file, at, length = piece
            number, entry = free.pop(), uring.io_uring_get_sqe(ring)
            if length != len(buffers[number]):
                buffers[number] = bytearray(length)
            prepare = uring.io_uring_prep_write if file == out else uring.io_uring_prep_read
            prepare(entry, file, buffers[number], at)
            entry.user_data = number + 1
            lengths[number] = length
            read_bytes += 0 if file == out else length
        if len(free) == DEPTH:
            break
        uring.io_uring_submit(ring)
        uring.io_uring_wait_cqe(ring, cqe)
        done = cqe[0]
        number = done.user_data - 1
        if done.res != lengths[number]:
            raise OSError(f"{done.res} bytes of {lengths[number]} came or went")
        uring.io_uring_cqe_seen(ring, done)
        free.append(number)
    os.fdatasync(out)
    uring.io_uring_queue_exit(ring)
    for file in (*files, out):
        os.close(file)
    took_s = time.perf_counter() - started
    return {"read_bytes": read_bytes, "read_s": took_s, "written_bytes": size, "write_s": took_s}


def cut(size: int) -> Iterator[tuple[int, int]]:
    """Yield where each piece of so many bytes begins, and its length."""
    for at in range(0, size, PIECE_BYTES):
        yield at, min(PIECE_BYTES, size - at)


def cut_files(files: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the pieces of the files, a piece of each in turn, as a merge reads them."""
    left = [(file, cut(os.fstat(file).st_size)) for file in files]
    while left:
        for one in list(left):
            piece = next(one[1], None)
            if piece is None:
                left.remove(one)
            else:
                yield one[0], *piece


def weave(
    reads: Sequence[tuple[int, int, int]], writes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield both in their order, so that both end at about the same time.

    >>> list(weave([(0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 1)], [(9, 0, 1), (9, 1, 1)]))
    [(0, 1, 1), (9, 0, 1), (0, 2, 1), (0, 3, 1), (9, 1, 1), (0, 4, 1)]
    """
    places = [((i + 0.5) / len(some), piece) for some in (reads, writes) for i, piece in enumerate(some)]
    for _, piece in sorted(places, key=lambda place: place[0]):
        yield piece


def make_buffer() -> memoryview:
    """Return memory that begins with a page, as what the kernel copies from does.

    Some processors (AMD EPYC, 2026-11-30) copy five times slower to what begins a few bytes later in its page, as
    Python's own bytes do: until then this floor was that much too high on them where it read from the page cache.
    """
    return memoryview(mmap.mmap(-1, BUFFER_BYTES))


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

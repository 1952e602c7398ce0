"""What glibc holds of blocks that were freed."""

import ctypes


def return_freed_pages() -> None:
    """Give the kernel the pages that glibc holds free; elsewhere nothing is done.

    Blocks of a megabyte or more that are freed between others that stay are else lost to the process: the next ones
    seldom fit into what they leave.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)

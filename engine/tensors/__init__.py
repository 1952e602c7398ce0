"""Lazy tensor expressions over stored bytes, and the statistics that they can gather."""

import sys

from mergemill.engine.errors import MergemillError

if sys.byteorder != "little":  # stored bytes are taken as they are, here and in the native loops
    raise MergemillError(
        f"this processor is {sys.byteorder}-endian, and checkpoints are little-endian: merges would be silently wrong; "
        "use one that is little-endian (x86-64, ARM64)"
    )

"""A script: merge the same data with every method and print the sha256 of each result, as JSON.

Run as ``python merge_everything.py FOLDER``, with FOLDER for scratch files; `test_machines.py` runs it as if
on machines with narrower vector registers.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from methods.harness import Mill, bits_of, make_values
from methods.suite import ENTRIES, make_task
from torch import Tensor

from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.tensors.exact import sum_blocks
from mergemill.engine.tensors.slabs import BLOCK

LONG, SHORT = (BLOCK + 4099,), (37, 29)  # ends that fill no vector register
WIDE = (
    (torch.float32, LONG, None),
    (torch.float64, LONG, None),
    (torch.bfloat16, LONG, "BF16"),
    (torch.float16, LONG, "F16"),
    (torch.float16, SHORT, "BF16"),
    (torch.bfloat16, SHORT, "F16"),
)


def checksum(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(bits_of(tensor)).hexdigest()


def main(folder: Path) -> None:
    """Print one JSON object: what the machine claims to be, and a checksum for each merge."""
    mill = Mill(folder)
    sums: dict[str, str] = {}
    for name in (name for name in find_methods() if name in ENTRIES and ENTRIES[name].everywhere):
        for kind, shape, out in WIDE:
            task = make_task(name, make_values(shape, dtype=kind))
            sums[f"{name}-0 {kind} {list(shape)} {out}"] = checksum(mill.merge(task, out=out))
        for i, variant in enumerate(ENTRIES[name].variants):
            task = make_task(name, make_values(SHORT), variant)
            sums[f"{name}-{i} {list(SHORT)}"] = checksum(mill.merge(task))
    values = make_values((3 * BLOCK + 5,), dtype=torch.float64)[0]
    sums["sum of blocks"] = str(sum_blocks(values).scaled)
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(json.dumps({"capability": capability, "sums": sums}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

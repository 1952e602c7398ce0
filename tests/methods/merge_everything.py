"""A script: merge the same data with every method and print the sha256 of each result, as JSON.

Run as ``python merge_everything.py FOLDER``, with FOLDER for scratch files; `test_machines.py` runs it as if
on machines with narrower vector registers.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from methods.suite import ENTRIES, Mill, bits_of, make_task, make_values

from mergemill.engine.methods.catalogue import find_methods
from mergemill.engine.tensors.exact import sum_blocks
from mergemill.engine.tensors.slabs import BLOCK

SHAPES = ((BLOCK + 4099,), (37, 29))  # ends that fill no vector register


def main(folder: Path) -> None:
    """Print one JSON object: what the machine claims to be, and a checksum for each merge."""
    mill = Mill(folder)
    sums: dict[str, str] = {}
    for name in find_methods():
        for i, variant in enumerate(ENTRIES[name].variants if name in ENTRIES else ()):
            for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for shape in SHAPES if i == 0 else SHAPES[1:]:
                    task = make_task(name, make_values(shape, dtype=kind), variant)
                    for out in ("BF16", "F16", None) if i == 0 else (None,):
                        key = f"{name}-{i} {kind} {list(shape)} {out}"
                        sums[key] = hashlib.sha256(bits_of(mill.merge(task, out=out))).hexdigest()
    values = make_values((3 * BLOCK + 5,), dtype=torch.float64)[0]
    sums["sum of blocks"] = str(sum_blocks(values).scaled)
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(json.dumps({"capability": capability, "sums": sums}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

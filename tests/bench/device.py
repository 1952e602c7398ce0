"""A merge on the GPU beside the same on the CPU: its name, the ratio, and the share of the copies' bandwidth.

Run as ``python tests/bench/device.py RECIPE FOLDER [METHOD…]`` where torch finds a CUDA device; RECIPE is merged into
new folders below FOLDER, with each METHOD instead of its own. Each figure is the least of three merges from a warm page
cache. Without a device it ends with one line.
"""

import shutil
import sys
import time
from pathlib import Path

import torch

from mergemill.engine import load_recipe, make_plan, run
from mergemill.engine.plan.values import Plan

TIMES = 3
COPIED_BYTES = 1 << 28


def main(recipe: str, folder: Path, methods: list[str]) -> None:
    """Print a table."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here: nothing is measured")
    bandwidth = measure_copies()
    sys.stdout.write(
        f"{torch.cuda.get_device_name(0)}; pinned memory is copied to it at {bandwidth / 1e9:.1f} GB/s\n\n"
    )
    sys.stdout.write("| method | CPU s | GPU s | CPU / GPU | share of the copies' bandwidth |\n|---|---|---|---|---|\n")
    value = load_recipe(recipe)
    for method in methods or [value.merge_method]:
        plan = make_plan(value.model_copy(update={"merge_method": method}))
        here_s, there_s = (measure(plan, folder / method, device) for device in ("cpu", "cuda"))
        share = plan.read_bytes / there_s / bandwidth
        sys.stdout.write(f"| {method} | {here_s:.2f} | {there_s:.2f} | {here_s / there_s:.2f} | {share:.1%} |\n")


def measure(plan: Plan, out: Path, device: str) -> float:
    """Return the least seconds of a merge."""
    taken_s = []
    for _ in range(TIMES):
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        run(plan, out, workers=0, memory="4GiB", device=device)
        taken_s.append(time.perf_counter() - started)
    shutil.rmtree(out)
    return min(taken_s)


def measure_copies() -> float:
    """Return the bytes a second that pinned memory is copied to the device at."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    taken_s = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken_s.append(time.perf_counter() - started)
    return COPIED_BYTES / min(taken_s)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

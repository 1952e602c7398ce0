"""Kill the tools that build models while they run, each at random moments: python kill_tools.py FOLDER KILLS.

A mixture, an extraction, adapters that are combined, stages, dictionaries of tensors and a merge by importances. A
child is killed, the next goes on; what is there in the end has the bytes of a run that nobody disturbed. A process of
its own, since it forks; it prints a line for each tool.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from runs.merging import SMALL_PART, hash_output, is_loadable, parts_of, write_family

from mergemill.engine import load_recipe, make_adapter_plan, make_lora_plan, make_plan, make_raw_plan, run
from mergemill.engine.plan.values import Plan


def make_plans(folder: Path) -> Mapping[str, Plan]:
    """Return a plan of each tool over the family in a folder, in small parts."""
    base, a, b = (str(folder / name) for name in ("base", "A", "B"))
    for name, model in (("a", a), ("b", b)):
        run(make_lora_plan(model, base, max_rank=6, include=("self_attn", "mlp")), folder / f"lora-{name}", workers=0)
    two = [{"model": a, "parameters": {"weight": 0.6}}, {"model": b, "parameters": {"weight": 0.4}}]
    thin = {"merge_method": "dare_ties", "base_model": base, "models": two, "parameters": {"density": 0.5}}
    result = {"merge_method": "model_stock", "base_model": base, "models": [{"model": "thin"}, {"model": b}]}
    with parts_of(SMALL_PART):
        return {
            "mixture": make_plan(
                {
                    "base_model": base,
                    "gate_mode": "random",
                    "experts": [{"source_model": a, "noise_scale": 0.01}, {"source_model": b, "reinit": 0.5}],
                }
            ),
            "extraction": make_lora_plan(a, base, max_rank=8),
            "adapters": make_adapter_plan(
                {
                    "adapters": [{"adapter": str(folder / f"lora-{name}")} for name in "ab"],
                    "combination_type": "ties_svd",
                    "parameters": {"density": 0.5, "svd_rank": 4},
                }
            ),
            "stages": make_plan({**result, "stages": [{**thin, "name": "thin"}]}),
            "dictionaries": make_raw_plan(load_recipe({**thin, "merge_method": "ties"})),
            "importances": make_plan(
                {
                    "merge_method": "fisher",
                    "models": [{**each, "importance": {"model": f"{each['model']}-squares"}} for each in two],
                }
            ),
        }


def write_squares(folder: Path) -> None:
    """Write importances of both models: their squares."""
    from models import read_tensors, write_tensors

    for name in "AB":
        (folder / f"{name}-squares").mkdir()
        squares = {key: each.float().square() for key, each in read_tensors(folder / name).items()}
        write_tensors(folder / f"{name}-squares", squares)


def start(plan: Plan, out: Path) -> int:
    """Run a plan in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(plan, out, workers=0, threads=2)
        status = 0
    finally:
        os._exit(status)


def kill(plan: Plan, out: Path, kills: int, whole_s: float, draw: random.Random) -> None:
    """Kill runs of a plan until it was so many times in the middle of one, and let the last come to its end."""
    while kills:
        child = start(plan, out)
        time.sleep(draw.uniform(0, whole_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills -= 1
        else:
            assert status == 0, "a run failed"
        if is_loadable(out) or not out.exists():
            shutil.rmtree(out, ignore_errors=True)
    assert os.waitpid(start(plan, out), 0)[1] == 0


def main(folder: Path, kills: int) -> None:
    """Spread so many kills over the tools."""
    draw = random.Random(17)
    write_squares(write_family(folder, vocab=700))
    plans = make_plans(folder)
    for number, (name, plan) in enumerate(plans.items()):
        share = kills // len(plans) + (number < kills % len(plans))
        began_s = time.monotonic()
        assert os.waitpid(start(plan, folder / f"{name}-whole"), 0)[1] == 0
        kill(plan, folder / name, share, time.monotonic() - began_s, draw)
        assert hash_output(folder / name) == hash_output(folder / f"{name}-whole"), name
        sys.stdout.write(f"{name}: {share} kills, {len(plan.parts)} parts\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

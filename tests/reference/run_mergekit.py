"""Run mergekit on local models, on one CPU thread and without network. Runs in mergekit's own environment.

    python run_mergekit.py recipe.yml out_dir [--seed N]
    python run_mergekit.py --batch jobs.json        # [{"recipe": text, "out": folder, "seed": N}, …]

A batch pays for the import once. Beside every `out` a file `<out>.error` is written where the merge failed.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.remove(str(Path(__file__).parent))  # or the mergekit.py beside this file would be the one imported

import yaml
from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
from mergekit.merge import run_merge  # type: ignore[import-not-found]
from mergekit.options import MergeOptions  # type: ignore[import-not-found]


def main() -> int:
    """Run the merges asked for, and return 1 where one of them failed."""
    parser = argparse.ArgumentParser(description="Run mergekit on local models.")
    parser.add_argument("recipe", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=Path)
    parser.add_argument("--shard-params", type=int, default=5_000_000_000)
    asked = parser.parse_args()
    if asked.batch:
        jobs = json.loads(asked.batch.read_text(encoding="utf-8"))
    elif asked.recipe and asked.out:
        text = asked.recipe.read_text(encoding="utf-8")
        jobs = [{"recipe": text, "out": str(asked.out), "seed": asked.seed}]
    else:
        parser.error("give a recipe and an output folder, or --batch")
    logging.disable(logging.WARNING)
    failed = sum(run_job(job, asked.shard_params) for job in jobs)
    return int(failed > 0)


def run_job(job: dict[str, Any], shard_params: int) -> bool:
    """Run one merge; where it fails, write why beside its folder and return True."""
    options = MergeOptions(
        random_seed=job.get("seed", 0),
        out_shard_size=shard_params,
        num_threads=1,
        quiet=True,
        write_model_card=False,
    )
    try:
        recipe = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
        run_merge(recipe, job["out"], options, config_source=job["recipe"])
    except Exception as error:  # noqa: BLE001 - whatever mergekit raises is the result
        message = f"{type(error).__name__}: {error}"
        Path(job["out"] + ".error").write_text(message, encoding="utf-8")
        print(job["out"], message, file=sys.stderr)  # noqa: T201
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())

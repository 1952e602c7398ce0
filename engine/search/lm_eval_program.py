"""The program that judges a model by lm_eval: its argument is JSON, and its last line the results by task, as JSON."""

import json
import os
import sys
from typing import Any


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what lm_eval finds: of each task its numbers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    path, arguments = asked["include_path"], dict(asked["model_args"])
    device = arguments.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    found = lm_eval.simple_evaluate(
        model=asked["backend"],
        model_args={"pretrained": asked["model"], **arguments},
        device=device if asked["backend"] == "hf" else None,
        tasks=[each["task"] for each in asked["tasks"]],
        num_fewshot=asked["num_fewshot"],
        limit=asked["limit"],
        apply_chat_template=asked["apply_chat_template"],
        fewshot_as_multiturn=asked["fewshot_as_multiturn"],
        task_manager=TaskManager(include_path=path) if path else None,
        log_samples=False,
        bootstrap_iters=1000,
    )
    assert found is not None, "lm_eval gives results to the first process alone"
    groups = found.get("groups") or {}
    return {name: dict(numbers) for name, numbers in (found["results"] | groups).items()}


if __name__ == "__main__":
    results = run(json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(results, default=str) + "\n")

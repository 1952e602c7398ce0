"""What a finished run gives to use: its card, its files, commands and code that load it."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from mergemill.cli.page import jobs
from mergemill.cli.page.jobs import MERGE, SEARCH, Errand
from mergemill.cli.page.roots import confine
from mergemill.cli.page.shelf import PLOT
from mergemill.engine import format_size

MOST_CARD_BYTES = 256 << 10
MOST_FILES = 200


def describe_result(root: Path, job: Errand) -> dict[str, Any]:
    """Return the card, the files and the ways to use a finished merge; its files only where it lies below the root."""
    if "://" in job.out:
        return {"card": "", "files": [], "uses": list_uses(job.out)}
    folder = confine(root, job.out)
    return {
        "card": _read_card(root, folder),
        "files": [(name, format_size(size)) for name, size in _list_files(folder)[:MOST_FILES]],
        "uses": list_uses(str(folder)),
    }


def list_uses(place: str) -> list[dict[str, str]]:
    """Return ways to use a merge, each with its title, and what to copy."""
    check = {"title": "Check it", "text": f"mergemill verify {shlex.quote(place)} --replay 5"}
    if "://" in place and not place.startswith("hf://"):
        return [check, {"title": "Publish it", "text": f"mergemill push {shlex.quote(place)} org/name"}]
    name = place.removeprefix("hf://")
    if "://" not in place and Path(place, "adapter_config.json").is_file():
        code = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained({_quote(name)}, dtype="auto", device_map="auto")'
        )
        return [{"title": "Load it in Python", "text": code}, check]
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"name = {_quote(name)}\n"
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)"
    )
    return [
        {"title": "Load it in Python", "text": code},
        {"title": "Serve it with vLLM", "text": f"vllm serve {shlex.quote(name)}"},
        check,
        {"title": "See what it is", "text": f"mergemill inspect {shlex.quote(place)}"},
    ]


def _quote(text: str) -> str:
    """Return a text as Python has it, in letters as they are."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(text)


def find_report(root: Path, job: Errand) -> Path | None:
    """Return the page of a run; None where it has none."""
    folder = jobs.find_folder(root, job.name)
    path = confine(root, f"{job.out}/{PLOT}") if job.kind == SEARCH else folder / jobs.REPORT
    return path if path.is_file() and not path.is_symlink() else None


def is_pushable(job: Errand, state: str) -> bool:
    """Whether a run is a merge that the Hub may have."""
    return job.kind == MERGE and state == "finished" and not job.out.startswith("hf://")


def _read_card(root: Path, folder: Path) -> str:
    path = confine(root, str(folder / "README.md"))
    try:
        with open(path, "rb") as file:
            return file.read(MOST_CARD_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _list_files(folder: Path) -> list[tuple[str, int]]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(str(path.relative_to(folder)), path.lstat().st_size) for path in (Path(place, n) for n in names)]
    return sorted(found)

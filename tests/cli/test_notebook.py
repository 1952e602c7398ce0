"""The notebook runs from a clean kernel, with packages alone, and what it shows is what it says."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "configs" / "notebooks" / "first-merge.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cells after they were run, in an empty folder."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
    return list(client.execute()["cells"])


def find_data(cells: list[Any], words: str, kind: str) -> str:
    """Return what the one cell with these words in it shows."""
    (cell,) = (each for each in cells if each["cell_type"] == "code" and words in each["source"])
    return "".join(output["data"].get(kind, "") for output in cell["outputs"] if "data" in output)


def test_plan_and_result_show_themselves(cells: list[Any]) -> None:
    assert find_data(cells, "\nplan", "text/html").startswith("<table><caption>Plan: task_arithmetic")
    result = find_data(cells, "mergemill.run(", "text/html")
    assert "<progress value=" in result
    assert "<caption>Committed: merged" in result


def test_pictures_are_shown(cells: list[Any]) -> None:
    assert "&lt;svg" in find_data(cells, "diff(", "text/html")


def test_the_merge_is_better_at_both_texts_than_each_tune(cells: list[Any]) -> None:
    found = ast.literal_eval(find_data(cells, "perplexity = {", "text/plain"))
    assert found["merged"] < min(found[f"models/{name}"] for name in ("harbour", "garden"))


def test_it_writes_sentences(cells: list[Any]) -> None:
    (cell,) = (each for each in cells if "go_on(" in each["source"] and each["cell_type"] == "code")
    said = "".join(output.get("text", "") for output in cell["outputs"] if output.get("name") == "stdout")
    assert said.startswith("The harbour wakes")
    assert "\nTo grow" in said


def test_it_is_kept_without_outputs_and_for_any_python() -> None:
    kept = json.loads(NOTEBOOK.read_text("utf-8"))
    assert [cell for cell in kept["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert kept["metadata"]["kernelspec"]["name"] == "python3"

"""The pages: what they name is there, what they show runs, and figures, tables and walks are those of the code."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import check_mergemill, iter_commands
from models import read_tensors, write_llama
from test_rooms import INSIDE_RUNS, MAY_IMPORT

from mergemill.engine.methods.catalogue import find_coefficients, find_methods, find_steps
from mergemill.engine.recipe import load_cluster, load_document, load_recipe
from mergemill.engine.recipe.access import ALLOWED
from mergemill.engine.recipe.adapters import parse_adapters
from mergemill.engine.recipe.clusters import KINDS
from mergemill.engine.recipe.searches import parse_search

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text("utf-8")
    for name in (
        "README.md",
        "configs/README.md",
        "deploy/README.md",
        "engine/README.md",
        "engine/methods/README.md",
        "tests/bench/README.md",
    )
}
README, ENGINE, BENCH = PAGES["README.md"], PAGES["engine/README.md"], PAGES["tests/bench/README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SECTIONS = [
    "Two commands",
    "A first real merge",
    "Object storage",
    "Clusters",
    "Submit and leave",
    "GPUs",
    "Security",
    "Coming from mergekit",
    "The recipe in brief",
    "Methods",
    "In memory",
    "How it works",
    "Speed",
    "Where to read on",
]

pages = pytest.mark.parametrize("page", PAGES)


def list_blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def list_rows(text: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `head`."""
    table = text[text.index(f"\n{head}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table[2:]]


def find_section(text: str, title: str) -> str:
    """Return what stands below a heading."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_readme_is_for_a_newcomer() -> None:
    assert README.count("\n") <= 260
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == SECTIONS
    assert re.findall(r"SIGKILL|seeds? \d\d|--seed \d\d", README) == []


def test_its_two_commands_install_what_there_is() -> None:
    demo, tests = list_blocks(find_section(README, "Two commands"), "sh")
    assert demo.endswith("venv/bin/pip install -c configs/constraints.txt . && venv/bin/mergemill demo\n")
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', tests)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert tests.endswith("&& venv/bin/pytest\n")


@pages
def test_links_are_relative_and_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", PAGES[page])
    assert links
    for name, anchor in links:
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.resolve().is_relative_to(ROOT), name
        assert target.exists(), name
        assert not anchor or anchor in list_anchors(target), f"{name}#{anchor}"


def list_anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pages
def test_files_that_are_named_are_there(page: str) -> None:
    named = re.findall(r"`((?:\.ci|cli|configs|deploy|engine|tests)/[\w./-]+)[` ]", PAGES[page])
    named += re.findall(r"(?:python|pytest)[^`\n]* (tests/[\w/]+\.py)", PAGES[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages
def test_commands_are_those_that_mergemill_has(page: str) -> None:
    for block in list_blocks(PAGES[page], "sh"):
        for words in iter_commands(block):
            words = [word for word in words if word not in (">", "recipe.schema.json")]
            assert check_mergemill(words)["command"] == words[0]


@pages
def test_commands_within_sentences_are_too(page: str) -> None:
    for command in re.findall(r"`mergemill ([a-z][^`]*)`", PAGES[page]):
        name, *words = shlex.split(" ".join(command.split()))
        assert f"--{name}" not in words
        known = list_options(name, *words)
        assert {word for word in words if word.startswith("--")} <= known, command


def list_options(command: str, *words: str) -> set[str]:
    """Return the options of a command, which must be one; a group's is named by the first of the words."""
    from mergemill.cli.app import make_command

    found: Any = make_command().commands[command]  # type: ignore[attr-defined]
    found = found.commands[words[0]] if hasattr(found, "commands") else found
    return {option for each in found.params for option in each.opts}


@pages
def test_recipes_and_cluster_files_are_valid(page: str, tmp_path: Path) -> None:
    for block in list_blocks(PAGES[page], "yaml"):
        *_, found = yaml.safe_load_all(block)  # the last document of several is the result
        if "adapters" in found:
            assert len(parse_adapters(block).adapters) == len(found["adapters"])
            continue
        if "merge_method" in found:
            assert load_recipe(block).merge_method == found["merge_method"]
            continue
        if "variables" in found:
            assert parse_search(block).variables
            continue
        if "experts" in found:
            assert len(load_document(block).experts) == len(found["experts"])
            continue
        shown = {"kind": "slurm", "workers": 1} if "kind" not in found else {}
        (tmp_path / "cluster.yml").write_text(yaml.safe_dump(shown | found))
        assert load_cluster(tmp_path / "cluster.yml").kind in KINDS


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, memory = list_blocks(README, "python")
    recipe, *_ = list_blocks(README, "yaml")
    folders = [tmp_path / "models" / name for name in ("base", "chat", "code")]
    for seed, folder in enumerate(folders):
        write_llama(folder, seed=seed, layers=1)
    (tmp_path / "recipe.yml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    exec(whole, {"__name__": "__main__"})
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    base, chat, code = map(read_tensors, folders)
    name = next(iter(base))
    known = {"base": base, "chat": chat, "code": code, "a": chat[name], "b": code[name]}
    exec(memory, known)
    assert set(known["merged"]) == set(base)
    assert known["weight"].shape == known["a"].shape


def test_all_methods_stand_in_the_readme() -> None:
    told = re.findall(r"`(\w+)`", "".join(row[0] for row in list_rows(README, "| method | what it does |")))
    assert sorted(told) == sorted([*find_methods(), *find_coefficients(), *find_steps()])


def test_kinds_of_clusters_are_all_named() -> None:
    told = find_section(README, "Clusters").partition("Kinds are ")[2].partition(";")[0]
    assert set(re.findall(r"`(\w+)`", told)) == set(KINDS)
    needed = "".join(row[1] for row in list_rows(PAGES["deploy/README.md"], "| where you are | kind | needs |"))
    assert set(re.findall(r"`(\w+)`", needed)) == set(KINDS)


def test_figures_of_the_readme_are_those_of_the_page_of_figures() -> None:
    figures = {row[0]: row for row in list_rows(BENCH, "| 1.1B, bf16 |")}
    shown = list_rows(README, "| method | floor s |")
    assert len(shown) >= 3
    for method, floor_s, ours_s, theirs_s, peaks in shown:
        row = figures[method]
        assert [floor_s, ours_s, theirs_s] == [cell.split(" (")[0] for cell in row[1:4]], method
        assert peaks == row[-1], method


def test_options_of_storage_are_those_that_may_stand_there() -> None:
    rows = list_rows(PAGES["configs/README.md"], "| schemes | options |")
    told = {scheme: tuple(read_words(options)) for schemes, options in rows for scheme in read_words(schemes)}
    own = {"far"}  # which a benchmark adds where it was imported before
    assert told == {scheme: names for scheme, names in ALLOWED.items() if scheme not in own}


def read_words(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_rooms_stand_in_their_order() -> None:
    cells = "".join(row[0] for row in list_rows(ENGINE, "| room |"))
    told = [name.removesuffix("/") for name in re.findall(r"`engine/(\w[\w/]*)", cells)]
    inside = [f"runs/{name}" for name in INSIDE_RUNS if name]
    assert set(told) == {*MAY_IMPORT, *inside, "__init__"}
    level = {name: number for number, name in enumerate(told)}
    up = [(room, other) for room, others in MAY_IMPORT.items() for other in others if level[other] < level[room]]
    assert up == []


@pytest.mark.parametrize("title", ["From a recipe to bytes", "From a URL to bytes"])
def test_a_walk_has_at_most_ten_stops_and_each_is_there(title: str) -> None:
    stops = list(iter_stops(find_section(ENGINE, title)))
    assert 5 <= len(stops) <= 10
    for path, linked, name in stops:
        assert path == linked
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / "engine" / path).read_text("utf-8"), re.MULTILINE), name


def iter_stops(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield of each stop its file, the link to it and the name in it."""
    lines = re.findall(r"^\d+\. .*$", text, re.MULTILINE)
    for line in lines:
        found = re.match(r"\d+\. \[`([\w/]+\.py)`\]\(([\w/]+\.py)\) `(\w+)`: ", line)
        assert found, line
        yield found[1], found[2], found[3]


def test_dependencies_are_those_that_are_installed() -> None:
    told = {name for row in list_rows(ENGINE, "| package | why |") for name in row[0].split(", ")}
    assert told == {re.split(r"[<>=]", each)[0] for each in PROJECT["dependencies"]}
    extras = set(re.findall(r"`\[([\w-]+)\]`", find_section(ENGINE, "Dependencies")))
    assert extras == set(PROJECT["optional-dependencies"]) - {"test", "fuzz"}


def test_commands_of_figures_take_the_options_that_are_shown() -> None:
    commands = re.findall(r"`[^`]*?python (tests/bench/\w+\.py)([^`]*)`", BENCH)
    assert len(commands) >= 8
    for script, given in commands:
        near = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / "bench").glob("*.py"))
        assert (ROOT / script).exists()
        assert [option for option in re.findall(r"--[\w-]+", given) if f'"{option}"' not in near] == [], script

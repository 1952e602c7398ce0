"""How a plan and a result show themselves, where names are hostile."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from models import write_llama

from mergemill.engine import diff, make_plan, run
from mergemill.engine.evaluation.sums import Evaluation
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs.events import Committed
from mergemill.engine.runs.tasks.guard import Report, TensorChange

HOSTILE = '"><script src=//evil></script>\n\x1b[2J\u202e&amp;<img onerror=x>'


class Reader(HTMLParser):
    """Reads a page as a browser does: its tags, and the text of cells."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("models")
    models = [{"model": write_llama(folder / name, seed=seed, layers=1)} for seed, name in enumerate("abcde")]
    return make_plan({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})


def make_committed() -> Committed:
    changes = tuple(TensorChange(HOSTILE, None, 2.0, 3, False, "has 3 values that are not finite") for _ in range(9))
    return Committed(HOSTILE, "d" * 64, 12, 3, 1 << 30, 2 << 30, 3.25, Report(changes, changes))


def test_a_plan_is_eight_lines(plan: Plan) -> None:
    lines = repr(plan).splitlines()
    assert len(lines) == 8
    assert max(map(len, lines)) <= 220
    assert lines[0] == "Plan: linear"
    assert lines[1].startswith("  models    5: ")
    assert lines[1].endswith("and 2 more")
    assert lines[7] == f"  digest    {plan.digest[:12]}"


def test_a_hostile_name_adds_no_line_and_no_escape(plan: Plan) -> None:
    hostile = replace(plan, sources=(replace(plan.sources[0], model=HOSTILE),), warnings=(HOSTILE * 100,))
    for shown in (repr(hostile), repr(make_committed())):
        assert len(shown.splitlines()) in (7, 8)
        assert all(line.isprintable() for line in shown.split("\n"))


def test_html_holds_tables_alone_and_the_names_as_text(plan: Plan) -> None:
    hostile = replace(plan, sources=(replace(plan.sources[0], model=HOSTILE),), warnings=(HOSTILE,))
    for page in (hostile._repr_html_(), make_committed()._repr_html_()):
        read = Reader(page)
        assert set(read.tags) == {"table", "caption", "tr", "th", "td"}
        assert read.open == []
        assert set(read.attributes) == {("scope", "row")}
        assert any("<script src=//evil></script>" in text for text in read.texts)


def test_a_comparison_and_an_evaluation_show_themselves_too(plan: Plan) -> None:
    found = diff(*(source.path for source in plan.sources[:2]), workers=0)
    lines = repr(found).splitlines()
    assert lines[0] == f"Diff: {found.models[0]}, beside {found.models[1]}"
    assert [line[2:14].strip() for line in lines[1:]] == ["tensors", "lone", "changed", "in the way", "read"]
    most = max(found.tensors, key=lambda each: each.deltas[0].relative or 0)
    assert lines[3].startswith(f"  changed     {most.name} {most.deltas[0].relative:.3%}, ")
    hostile = replace(found, models=(HOSTILE, HOSTILE), why_not=(HOSTILE,))
    judged = Evaluation(12.5, 2.5, 1.25, 1000, 4096, 0.25, 2.0)
    for page in (hostile._repr_html_(), judged._repr_html_()):
        assert set(Reader(page).tags) == {"table", "caption", "tr", "th", "td"}
    assert repr(judged).startswith("Evaluation: perplexity 12.5\n  loss           2.5 nats a token\n")


def test_what_a_merge_returns_says_what_it_did(plan: Plan, tmp_path: Path) -> None:
    done = run(plan, tmp_path / "out", workers=0)
    lines = repr(done).splitlines()
    assert lines[0] == f"Committed: {tmp_path / 'out'}"
    assert [line.split()[0] for line in lines[1:]] == ["wrote", "read", "took", "guard", "changed", "digest"]
    assert lines[4] == "  guard    nothing found"
    assert Reader(done._repr_html_()).texts[0] == lines[0]


def test_the_guards_findings_are_told() -> None:
    assert "  guard    9: " in repr(make_committed())
    found = TensorChange("a.weight", 0.5, 2.0, 0, False, "changed 20 times")
    shown = repr(replace(make_committed(), guard=Report((found,), (found,))))
    assert "  guard    1: a.weight changed 20 times\n  changed  a.weight 50.000%\n" in shown

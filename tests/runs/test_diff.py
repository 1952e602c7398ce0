"""What is told of two models is true: against float64 in NumPy, for any cut, on processes; and the page shows it."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from models import read_tensors, write_json
from runs.merging import SMALL_PART, parts_of
from safetensors.torch import save_file

from mergemill.cli.main import execute
from mergemill.engine import diff, errors
from mergemill.engine.runs.differences import Diff, TensorDiff
from mergemill.engine.tensors.comparing import SAMPLED

EXPERTS = 4


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``a``, ``b`` and their base ``c``, with routers; ``b`` has changes of rank 2."""
    folder, stream = tmp_path_factory.mktemp("mixtures"), torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (300, 64),
        **{f"model.layers.{i}.self_attn.q_proj.weight": (64, 64) for i in range(3)},
        **{f"model.layers.{i}.mlp.gate.weight": (EXPERTS, 64) for i in range(3)},
        **{f"model.layers.{i}.mlp.experts.gate_up_proj": (EXPERTS, 96, 64) for i in range(3)},
        **{f"model.layers.{i}.input_layernorm.weight": (64,) for i in range(3)},
    }

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=stream)

    base = {name: draw(*shape) for name, shape in shapes.items()}
    a = {name: tensor + 0.1 * draw(*tensor.shape) for name, tensor in base.items()}
    b = {
        name: tensor + draw(*tensor.shape[:-1], 2) @ draw(2, tensor.shape[-1]) / 20 if tensor.dim() > 1 else a[name]
        for name, tensor in base.items()
    }
    b["model.embed_tokens.weight"][100:] = base["model.embed_tokens.weight"][100:]
    for name, tensors in (("a", a), ("b", b), ("c", base)):
        (folder / name).mkdir()
        extra = {"model.layers.0.steps": torch.arange(5)}
        save_file({**tensors, **extra}, folder / name / "model.safetensors")
        write_json(folder / name / "config.json", {"model_type": "qwen3_moe", "num_hidden_layers": 3})
    return folder


def compare(folder: Path, *names: str, part_bytes: int = 1 << 30, workers: int = 0) -> Diff:
    with parts_of(part_bytes):
        return diff(*(str(folder / name) for name in names), workers=workers, threads=None if workers else 2)


def find(found: Diff, name: str) -> TensorDiff:
    return next(each for each in found.tensors if each.name == name)


def test_numbers_are_those_of_float64(mixtures: Path) -> None:
    found = compare(mixtures, "a", "b", "c")
    a, b, c = (read_tensors(mixtures / name) for name in "abc")
    assert len(found.tensors) == len(a)
    for each in (tensor for tensor in found.tensors if tensor.deltas):
        x, y = (value[each.name].double() - c[each.name].double() for value in (a, b))
        own, (first, second) = c[each.name].double(), each.deltas
        assert first.norm == pytest.approx(float(x.norm()), rel=1e-6)
        assert second.relative == pytest.approx(float(y.norm() / own.norm()), rel=1e-6)
        assert each.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
        assert second.unchanged == float((y == 0).double().mean())
        both = (x.float() != 0) & (y.float() != 0)
        assert each.signs == pytest.approx(float((x.sign() == y.sign())[both].double().mean()), abs=1e-3)
        assert second.largest == pytest.approx(float(y.abs().max()), rel=1e-5)
        assert each.identical == torch.equal(a[each.name], b[each.name])
    assert {each.name.rsplit(".", 2)[1] for each in found.tensors if each.identical} == {"input_layernorm", "0"}


def test_without_a_base_the_second_is_compared_with_the_first(mixtures: Path) -> None:
    each = find(compare(mixtures, "a", "b"), "model.layers.1.self_attn.q_proj.weight")
    a, b = (read_tensors(mixtures / name)[each.name].double() for name in "ab")
    (delta,) = each.deltas
    assert delta.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert each.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
    sampled = (b - a).float().flatten()[::SAMPLED]
    assert sum(delta.histogram) == len(sampled)
    assert delta.histogram[48 - 3] == int(((sampled.abs() >= 2**-3) & (sampled.abs() < 2**-2)).sum())


def test_the_effective_rank_is_that_of_the_singular_values(mixtures: Path) -> None:
    found = compare(mixtures, "a", "b", "c")
    for name, most_wrong in (("model.layers.0.self_attn.q_proj.weight", 0.4), ("model.embed_tokens.weight", 0.4)):
        for side, model in enumerate("ab"):
            change = read_tensors(mixtures / model)[name].double() - read_tensors(mixtures / "c")[name].double()
            squares = torch.linalg.svdvals(change) ** 2
            assert find(found, name).deltas[side].rank == pytest.approx(
                float(squares.sum() ** 2 / (squares**2).sum()), rel=most_wrong
            )


def test_a_routers_experts_are_told_one_by_one(mixtures: Path) -> None:
    each = find(compare(mixtures, "a", "b", "c"), "model.layers.2.mlp.gate.weight")
    b, c = (read_tensors(mixtures / name)[each.name].double() for name in "bc")
    np.testing.assert_allclose(each.deltas[1].experts, (b - c).norm(dim=1) / c.norm(dim=1), rtol=1e-6)


def test_no_cut_and_no_process_shows(family: Path) -> None:
    whole = compare(family, "A", "B", "base")
    for cut in (compare(family, "A", "B", "base", part_bytes=SMALL_PART), compare(family, "A", "B", "base", workers=2)):
        for one, other in zip(whole.tensors, cut.tensors, strict=True):
            assert [replace(delta, rank=None) for delta in one.deltas] == [
                replace(delta, rank=None) for delta in other.deltas
            ]
            assert replace(one, deltas=()) == replace(other, deltas=())
            for left, right in zip(one.deltas, other.deltas, strict=True):
                assert (left.rank or 0) == pytest.approx(right.rank or 0, rel=1e-4)


def test_models_that_cannot_be_merged_are_told_why(mixtures: Path, family: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(mixtures / "a", other)
    tensors = read_tensors(other)
    del tensors["model.layers.2.mlp.gate.weight"]
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, other / "model.safetensors")
    found = diff(str(mixtures / "a"), str(other), workers=0)
    assert found.only == {str(mixtures / "a"): ("model.layers.2.mlp.gate.weight",), str(other): ()}
    assert found.shapes == {"model.embed_tokens.weight": ((300, 64), (200, 64))}
    assert found.why_not == (
        f"1 tensor only in {mixtures / 'a'}: model.layers.2.mlp.gate.weight",
        "1 tensor of different shapes: model.embed_tokens.weight is [300, 64] and [200, 64]",
    )
    assert all(each.identical for each in found.tensors)
    with pytest.raises(errors.PlanError, match="a model is named twice"):
        diff(str(family / "A"), str(family / "A"))


def test_the_command_prints_a_table_and_json(mixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(mixtures / name) for name in "abc")
    assert execute(["diff", a, b, "--base", c, "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "router" in shown
    assert "model.layers.0.mlp.experts.gate_up_proj" in shown
    assert execute(["diff", a, b, "--json", "--tensors", "--workers", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"]["norm"][0]["tensors"] == 3
    assert len(found["tensors"]) == 14
    assert "nan" not in json.dumps(found).lower()


class Pictures(HTMLParser):
    """Counts pictures, and what they are drawn of."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[int] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "svg":
            self.pictures.append(0)
        elif tag == "path" and dict(attrs).get("aria-roledescription") in ("rect mark", "bar", "point", "rect"):
            self.pictures[-1] += 1


@pytest.fixture(scope="module")
def page(mixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vl_convert")
    path = tmp_path_factory.mktemp("page") / "diff.html"
    models = [str(mixtures / name) for name in "ab"]
    assert execute(["diff", *models, "--base", str(mixtures / "c"), "--html", str(path), "--workers", "0"]) == 0
    return path


def test_every_picture_of_the_page_is_drawn(page: Path) -> None:
    found = Pictures()
    text = page.read_text()
    found.feed(text)
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert (
        len(captions)
        == len(found.pictures)
        == len(set(found.pictures)) + len(found.pictures) - len(set(found.pictures))
    )
    assert all(found.pictures), dict(zip(captions, found.pictures, strict=True))
    for what in (
        "Change by layer and kind",
        "Cosine",
        "Effective rank",
        "Change by depth",
        "Drift of the router",
        "Sizes",
    ):
        assert any(caption.startswith(what) for caption in captions), what


def test_the_page_needs_no_network_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    found = Pictures()
    found.feed(text)
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in text


def test_the_page_fits_a_telephone_in_the_dark(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    measured = page.read_text().replace(
        "</body>",
        "<script>document.title=JSON.stringify([document.documentElement.scrollWidth,[...document.querySelectorAll('svg')]"
        ".every(e=>e.getBoundingClientRect().width>100&&e.getBoundingClientRect().height>40)])</script></body>",
    )
    measured = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", measured)
    (tmp_path / "page.html").write_text(measured)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    width, drawn = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])  # type: ignore[index]
    assert width <= 500  # which is the least that a window of Chromium has
    assert drawn


def test_a_merge_reports_what_it_changed(family: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    (tmp_path / "recipe.yml").write_text(
        f"{{merge_method: task_arithmetic, base_model: {family / 'base'}, models: [{{model: {family / 'A'}}}], "
        f"parameters: {{weight: 0.5}}}}"
    )
    report = tmp_path / "report.html"
    out = str(tmp_path / "out")
    assert execute(["merge", str(tmp_path / "recipe.yml"), out, "--report", str(report), "--quiet"]) == 0
    text = report.read_text()
    assert "<h1>What task_arithmetic changed</h1>" in text
    assert "found nothing" in text
    assert f"{out} less {family / 'base'}" in text


def test_a_name_of_a_model_is_no_markup(mixtures: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    strange = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(mixtures / "a", strange / "x")
    assert execute(["diff", str(strange / "x"), str(mixtures / "b"), "--html", str(tmp_path / "p.html")]) == 0
    assert "<script" not in (tmp_path / "p.html").read_text()


def test_a_page_without_a_place_is_an_error_before_anything_is_read(
    mixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["diff", str(mixtures / "a"), str(mixtures / "b"), "--html", str(tmp_path / "no" / "p.html")]) == 2
    assert "its folder is not there" in capsys.readouterr().err
    assert execute(["diff", str(mixtures / "a"), str(mixtures / "b"), "--html", str(tmp_path)]) == 2
    assert f"is a folder; name a file, such as {tmp_path}/report.html" in capsys.readouterr().err


def test_a_tensor_that_is_not_finite_has_no_cosine_and_no_common_tensor_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"one": torch.ones(4, 4), "other": torch.full((4, 4), torch.nan), "small": torch.ones(2, 4)}
    for name, values in sizes.items():
        (tmp_path / name).mkdir()
        save_file({"model.norm.weight": values}, tmp_path / name / "model.safetensors")
    (tensor,) = diff(str(tmp_path / "one"), str(tmp_path / "other")).tensors
    assert tensor.cosine is not None
    assert math.isnan(tensor.cosine)
    assert execute(["diff", str(tmp_path / "one"), str(tmp_path / "small")]) == 0
    assert "nothing to compare" in capsys.readouterr().out

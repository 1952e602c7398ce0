"""Who is refused by the page, and what it does not reach: requests as an attacker makes them."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from page.conftest import ADDRESS, TOKEN, Ask

from mergemill.cli.main import execute
from mergemill.cli.page import jobs
from mergemill.cli.page.form import read_form
from mergemill.cli.page.gate import Address, find_refusal
from mergemill.cli.page.roots import check_out, check_recipe, confine
from mergemill.cli.page.serve import take_token
from mergemill.engine import make_recipe, read_recipe
from mergemill.engine.errors import InputError, OutputError, RecipeError

RECIPE = 'merge_method: linear\nmodels: [{{model: "{}", parameters: {{weight: 1}}}}]\n'


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1:8798"}, 421),
        ({"host": "127.0.0.1.evil.example:8797"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"authorization": None}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Bearer {TOKEN}x"}, 401),
        ({"authorization": None, "cookie": f"token={TOKEN}"}, 401),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_a_request_from_elsewhere_or_without_the_token_is_refused(
    ask: Ask, headers: dict[str, str | None], status: int
) -> None:
    answer = ask("POST", "/api/look", {"content-type": "application/json", **headers}, content='{"text": ""}')
    assert answer.status_code == status
    assert answer.json()["message"]


def test_the_page_itself_holds_no_secret_and_is_asked_of_by_its_own_names_alone(ask: Ask) -> None:
    for path in ("/", "/static/main.js", "/static/page.css"):
        answer = ask("GET", path, {"authorization": None})
        assert answer.status_code == 200
        assert TOKEN not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert ask("GET", path, {"host": "evil.example"}).status_code == 421
        assert ask("POST", path).status_code == 405
    assert ask("GET", "/api/start", {"host": "localhost:8797"}).status_code == 200
    assert ask("GET", "/api/start").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/../etc/passwd"]
)
def test_no_file_but_the_pages_own_is_served(ask: Ask, path: str) -> None:
    assert ask("GET", path).status_code in (401, 404, 405)


def test_behind_a_proxy_its_host_is_that_of_the_page() -> None:
    address = Address("0.0.0.0", 7860, "https://me.hf.space", "https://huggingface.co")
    headers = {"host": "me.hf.space", "origin": "https://me.hf.space", "authorization": "Bearer t"}
    assert find_refusal(address, "t", method="GET", path="/api/runs", headers=headers) is None
    other = {**headers, "host": "127.0.0.1:7860"}
    assert find_refusal(address, "t", method="GET", path="/", headers=other) == (
        421,
        "this page is not at 127.0.0.1:7860",
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("../outside", "leads out of"),
        ("models/../../outside", "leads out of"),
        ("{outside}", "leads out of"),
        ("~", "leads out of"),
        ("link", "leads out of"),
        ("linked", "leads out of"),
        ("file://{outside}", "this page reads folders below"),
        ("sftp://host/model", "this page reads folders below"),
    ],
)
def test_no_model_out_of_the_root_is_read(ask: Ask, root: Path, model: str, words: str) -> None:
    outside = root.parent / "outside"
    if not (root / "link").exists():
        (root / "link").symlink_to(outside)
        (root / "linked").mkdir()
        for name in ("config.json", "model.safetensors"):
            (root / "linked" / name).symlink_to(outside / name)
    model = model.format(outside=outside)
    look = ask("POST", "/api/look", json={"text": RECIPE.format(model)}).json()
    assert look["plan"] is None
    assert words in look["error"]["message"]
    for answer in (
        ask("GET", "/api/facts", params={"model": model}),
        ask("POST", "/api/compare", json={"first": "models/a", "second": model}),
        ask("POST", "/api/merge", json={"text": RECIPE.format(model), "out": "merged"}),
    ):
        assert answer.status_code == 400
        assert words in answer.json()["message"]


@pytest.mark.parametrize(
    "recipe",
    [
        "{merge_method: linear, base_model: ../outside, models: [{model: models/a}]}",
        "{merge_method: linear, models: [{model: models/a+../outside}]}",
        "{merge_method: linear, models: [{model: {path: ../outside}}]}",
        "{merge_method: linear, models: [{model: {model: models/a, adapters: [{adapter: ../outside}]}}]}",
        "{merge_method: ties, base_model: models/base, models: [{model: models/a, delta_base: ../outside}]}",
        "{merge_method: linear, models: [{model: models/a}], tokenizer_source: ../outside}",
        "{merge_method: linear, models: [{model: models/a}], tokenizer: {tokens: {x: {source: ../outside}}}}",
        "{merge_method: linear, models: [{model: models/a}], policy: [{filter: x, action: copy, model: ../outside}]}",
        "{merge_method: passthrough, slices: [{sources: [{model: ../outside, layer_range: [0, 1]}]}]}",
        "{merge_method: linear, modules: {default: {models: [{model: ../outside}]}}}",
        "{base_model: models/a, gate_mode: random, experts: [{source_model: ../outside}, {source_model: models/b}]}",
        "{name: x, merge_method: ram, models: [{model: ../outside}]}\n---\n{merge_method: ties, models: [{model: x}]}",
    ],
)
def test_no_key_of_a_recipe_names_a_model_out_of_the_root(ask: Ask, recipe: str) -> None:
    error = ask("POST", "/api/look", json={"text": recipe}).json()["error"]
    assert "outside: leads out of" in error["message"]


def test_a_model_below_the_root_is_read_by_whatever_path(ask: Ask, root: Path) -> None:
    for model in ("models/a", str(root / "models" / "a"), "./models/../models/a"):
        assert ask("POST", "/api/look", json={"text": RECIPE.format(model)}).json()["error"] is None


@pytest.mark.parametrize(
    "out", ["../merged", "/tmp/merged", "models/../../x", "file:///x", ".", ".ssh/x", "sftp://h/x", "--report", "./-x"]
)
def test_nothing_is_written_out_of_the_root(ask: Ask, root: Path, out: str) -> None:
    answer = ask("POST", "/api/merge", json={"text": RECIPE.format("models/a"), "out": out})
    assert answer.status_code == 400
    with pytest.raises(OutputError):
        check_out(root, out)


MIXTURE = """\
base_model: models/base
x: &q 1
experts_per_token: *q
experts: [{source_model: models/a, %s}, {source_model: models/b, positive_prompts: [b]}]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE.format("models/a") + "methods: [../ran.py]", "line 3: 'methods'"),
        (RECIPE.format("models/a") + "x: &x {methods: [../ran.py]}\ny: *x", "line 3: 'methods'"),
        (RECIPE.format("models/a") + "<<: {? methods\n: ../ran.py}", "line 3: 'methods'"),
        ('"me\\x74hods": ran.py\nx: &q 1\n' + RECIPE.format("models/a").replace(": 1}", ": *q}"), "line 1: 'methods'"),
        (MIXTURE % '"prompts_\\x66ile": secret.txt', "line 4: 'prompts_file'"),
        (MIXTURE % "positive_prompts: [a]" + '"g\\x61tes": secret.txt\ngate_mode: file', "line 5: 'gates'"),
        (
            "name: x\nkeep: ../kept\nmerge_method: linear\nmodels: [{model: models/a}]\n---\n" + RECIPE.format("x"),
            "line 2: 'keep'",
        ),
        (
            RECIPE.format("x") + 'stages: [{name: x, "k\\x65ep": /kept, merge_method: linear, models: []}]',
            "line 3: 'keep'",
        ),
        ("a: [" + "methods: x", "not valid YAML"),
    ],
)
def test_no_recipe_names_files_to_run_read_or_write(ask: Ask, root: Path, text: str, words: str) -> None:
    for place in (root, root.parent):
        (place / "ran.py").write_text(f"open({str(root / 'ran')!r}, 'w')")
        (place / "secret.txt").write_text("a secret")
    answer = ask("POST", "/api/look", json={"text": text})
    assert words in answer.json()["error"]["message"]
    assert "a secret" not in answer.text
    refused = ask("POST", "/api/merge", json={"text": text, "out": "never"})
    assert (refused.status_code, (root / "ran").exists(), (root / "never").exists()) == (400, False, False)


def test_a_recipe_that_names_files_is_refused_however_it_was_read(root: Path) -> None:
    """The second line of defence: what the first overlooks is neither read by the loader nor planned."""
    (root / "secret.txt").write_text("a secret")
    texts = {
        "methods": RECIPE.format("models/a") + "methods: ran.py",
        "prompts_file": MIXTURE % "prompts_file: secret.txt",
        "keep": "name: x\nkeep: kept\n" + RECIPE.format("models/a") + "---\n" + RECIPE.format("x"),
    }
    for key, text in texts.items():
        recipe = make_recipe(read_recipe(text), text)
        assert "a secret" not in str(recipe)
        with pytest.raises(RecipeError, match=f"'{key}' names files"):
            check_recipe(root, recipe)


def test_methods_of_ones_own_are_those_that_the_page_was_started_with(ask: Ask) -> None:
    names = [method["name"] for method in ask("GET", "/api/start").json()["methods"]]
    assert "ties" in names
    assert "patient" not in names


@pytest.mark.parametrize(
    "given",
    [
        {"memory": "1GiB --methods x.py"},
        {"memory": "--x"},
        {"workers": "-1"},
        {"seed": "1;2"},
        {"shard_size": "$(id)"},
        {"text": 5},
        {"text": "x" * (2 << 20)},
        {"text": "x: [" + "1," * (40 << 10) + "1]"},
        {"memory": "9" * 5000},
        {"seed": "9" * 5000},
        {"out": "a\ud800"},
        {"out": "s3://a\0b"},
        {"text": RECIPE.format("models/a").replace("1}", "0x" + "f" * 9000 + "}")},
        {"text": RECIPE.format("models/a").replace("1}", "59" + ":59" * 4000 + "}")},
        {"text": RECIPE.format("models/\ud800")},
        {"text": RECIPE.format("models/\\ud800")},
    ],
)
def test_what_a_browser_chooses_is_checked_before_it_is_a_command(ask: Ask, given: dict[str, Any]) -> None:
    body = {"text": RECIPE.format("models/a"), "out": "never", **given}
    for path in ("/api/merge", "/api/look"):
        answer = ask("POST", path, content=json.dumps(body), headers={"content-type": "application/json"})
        told = answer.json()
        assert answer.status_code in ((400,) if path == "/api/merge" else (200, 400)), told
        assert "\n" not in (told.get("message") or told.get("option_error") or told["error"]["message"])


def test_a_form_with_a_value_that_is_none_is_refused(ask: Ask) -> None:
    form = asdict(read_form(RECIPE.format("models/a")))
    row = form["models"][0]
    for wrong in ({"place": "x"}, {"parameters": {"weight": "0x" + "f" * 9000}}):
        body = {"text": "", "form": {**form, "models": [{**row, **wrong}]}}
        assert ask("POST", "/api/write", json=body).status_code == 400


@pytest.mark.parametrize("name", ["../../etc", "0123456789abcdef", "", "..%2f..", "0" * 16 + "/x"])
def test_a_run_is_none_but_by_its_identity(ask: Ask, name: str) -> None:
    for path in ("run", "result"):
        assert ask("GET", f"/api/{path}", params={"id": name}).status_code == 400
    for path in ("cancel", "resume", "abort", "show", "push"):
        assert ask("POST", f"/api/{path}", json={"id": name, "repository": "a/b"}).status_code == 400


def test_notes_that_somebody_else_wrote_name_no_command_and_no_place(root: Path) -> None:
    """Whoever writes below the root could forge them: what they say is checked as what a browser says."""
    name = jobs.make_name("merge", "forged")
    folder = root / jobs.FOLDER / name
    folder.mkdir(parents=True)
    told = '{"kind": "merge", "out": "forged", "chosen": {"memory": "1GiB --methods x.py"}, "words": []}'
    (folder / jobs.NOTE).write_text(told)
    assert jobs.read_job(root, name) is None
    (folder / jobs.NOTE).write_text('{"kind": "merge", "out": "../x", "chosen": {}, "words": []}')
    assert jobs.read_job(root, name) is None
    jobs.forget(root, name)


def test_another_host_wants_a_token_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGEMILL_UI_TOKEN", raising=False)
    assert len(take_token(ADDRESS)) >= 32
    with pytest.raises(InputError, match="wants a token of your own in the variable MERGEMILL_UI_TOKEN"):
        take_token(Address("10.0.0.1", 80))
    monkeypatch.setenv("MERGEMILL_UI_TOKEN", "short")
    with pytest.raises(InputError, match="has 5 characters; 16 are the least"):
        take_token(Address("10.0.0.1", 80))
    monkeypatch.setenv("MERGEMILL_UI_TOKEN", TOKEN)
    assert take_token(Address("10.0.0.1", 80)) == TOKEN
    assert "MERGEMILL_UI_TOKEN" not in os.environ  # which runs inherit
    with pytest.raises(InputError, match="say with --url"):
        take_token(Address("0.0.0.0", 80))


@pytest.mark.parametrize("option", ["--url", "--framed-by"])
def test_a_site_is_a_scheme_and_a_host(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["ui", option, "https://x'; script-src *"]) == 2
    assert "write scheme and host alone" in capsys.readouterr().err


def test_a_path_is_where_it_leads(root: Path) -> None:
    assert confine(root, "models/../models/a") == root / "models" / "a"
    for wrong in ("", "a\0b", "..", "/"):
        with pytest.raises(RecipeError):
            confine(root, wrong)


def test_a_report_is_shown_once_and_runs_nothing(ask: Ask, root: Path, app: Any) -> None:
    job = jobs.Errand(jobs.COMPARE, "models/a", words=("models/a", "models/b"))
    folder = root / jobs.FOLDER / job.name
    folder.mkdir(parents=True)
    (folder / jobs.NOTE).write_text(json.dumps(asdict(job)))
    (folder / jobs.REPORT).write_text("<script>1</script>")
    address = ask("POST", "/api/show", json={"id": job.name}).json()["address"]
    shown = ask("GET", address, {"authorization": None, "origin": None})
    assert shown.text == "<script>1</script>"
    assert shown.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert ask("GET", address).status_code == 404
    jobs.forget(root, job.name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere: is no folder; make it first"),
        ((".", "--scheduler", "tcp://s:1", "--cluster", "slurm"), "--scheduler and --cluster exclude each other"),
        ((".", "--cluster", "nowhere.yml"), "nowhere.yml"),
    ],
)
def test_a_page_that_cannot_be_is_not_begun(
    words: tuple[str, ...], said: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert execute(["ui", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_its_packages_the_page_names_its_extra(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mergemill.cli.page.serve", raising=False)
    assert execute(["ui"]) == 2
    assert "pip install mergemill[ui]" in capsys.readouterr().err

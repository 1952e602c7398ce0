"""A user's own methods: from a file, on workers that do not see it, resumed, verified and published."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import read_tensors, write_llama
from runs.merging import flip_bit, hash_output, parts_of

from mergemill.cli.main import execute
from mergemill.engine import load_recipe, make_plan, merge, merge_tensors, run, verify
from mergemill.engine.errors import MethodsError, OutputError, PlanError, RecipeError, RunError, VerifyError
from mergemill.engine.methods import merge_method
from mergemill.engine.methods.own import MethodsFile, find_all_methods, open_methods
from mergemill.engine.plan.values import Plan
from mergemill.engine.runs import running
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.tensors.slabs import BLOCK

CODE = '''\
"""Own: methods with helpers, constants and statistics.

Source: a test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergemill.engine.methods import PerModel, merge_method
from mergemill.engine.methods.gram import GRAM_BYTES, gram_matrix

HALF = 0.5


@dataclass(frozen=True)
class Share:
    of: float


def halve(tensor: Tensor) -> Tensor:
    return tensor.mul_(Share(HALF).of)


@merge_method(reads="element", base="required")
def middle(base: Tensor, deltas: list[Tensor], *, weight: PerModel[float] = (1.0,)) -> Tensor:
    """Halfway to the first model."""
    return base.add_(halve(deltas[0].mul_(weight[0])))


@merge_method(reads="gram", statistics=gram_matrix, rounds=1, extra_bytes=GRAM_BYTES)
def unit(models: list[Tensor], statistics: tuple[tuple[float, ...], ...]) -> Tensor:
    """The first model, made a unit vector."""
    return models[0].mul_(statistics[0][0] ** -HALF)
'''
RECIPE = """\
merge_method: {method}
methods: own.py
{base}
models: [{{model: ../base}}, {{model: ../a}}]
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``base`` and ``a``."""
    folder = tmp_path_factory.mktemp("zoo")
    base = write_llama(folder / "base", seed=0, layers=1, vocab=1500, hidden=256)
    write_llama(folder / "a", seed=1, layers=1, vocab=1500, hidden=256, near=base)
    return folder


@pytest.fixture
def here(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``own.py`` and recipes for its methods, the models beside it; the working directory is another."""
    for name in ("base", "a"):
        (tmp_path / name).symlink_to(zoo / name)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    (folder / "middle.yml").write_text(RECIPE.format(method="middle", base="base_model: ../base"))
    (folder / "unit.yml").write_text(RECIPE.format(method="unit", base=""))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plan_merge(here: Path, method: str = "middle") -> Plan:
    with parts_of(2 * BLOCK):  # tensors are cut, so that their rounds are tasks of their own
        return make_plan(load_recipe(here / f"{method}.yml"))


def expect(zoo: Path, method: str) -> dict[str, torch.Tensor]:
    base, a = read_tensors(zoo / "base"), read_tensors(zoo / "a")
    if method == "middle":
        return {name: (base[name].float() + 0.5 * (a[name].float() - base[name].float())) for name in base}
    return {name: base[name].float() / base[name].double().norm() for name in base}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", ["middle", "unit"])
def test_workers_need_not_see_the_file(method: str, workers: int, here: Path, zoo: Path, tmp_path: Path) -> None:
    plan = plan_merge(here, method)
    (here / "own.py").unlink()
    run(plan, tmp_path / "out", workers=workers, threads=1)
    merged = read_tensors(tmp_path / "out")
    for name, values in expect(zoo, method).items():
        assert torch.allclose(merged[name].double(), values.double(), rtol=2**-8, atol=1e-6), name


def test_threads_and_processes_write_the_same_bytes(here: Path, tmp_path: Path) -> None:
    plan = plan_merge(here, "unit")
    run(plan, tmp_path / "threads", workers=0, threads=2)
    run(plan, tmp_path / "processes", workers=2)
    assert hash_output(tmp_path / "threads") == hash_output(tmp_path / "processes")


# ------------------------------------------------------------------------------------------ what the digest covers


def stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end before its commit."""
    monkeypatch.setattr(running, "commit_output", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_changed_file_is_another_merge(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_merge(here)
    with monkeypatch.context() as patch:
        stop_early(patch)
        with pytest.raises(KeyboardInterrupt):
            run(first, tmp_path / "out", workers=0, threads=1)
    (here / "own.py").write_text(CODE.replace("HALF = 0.5", "HALF = 0.25"))
    changed = plan_merge(here)
    assert changed.digest != first.digest
    with pytest.raises(OutputError, match="holds another merge, which differs in the methods file"):
        run(changed, tmp_path / "out", workers=0, threads=1)
    (here / "own.py").write_text(CODE)
    again = plan_merge(here)
    assert again.digest == first.digest
    assert run(again, tmp_path / "out", workers=0, threads=1).redone_parts == 0


def test_the_digest_of_a_merge_without_own_methods_knows_nothing_of_them(here: Path) -> None:
    (here / "linear.yml").write_text("{merge_method: linear, models: [{model: ../a}], parameters: {weight: 1}}")
    recipe = load_recipe(here / "linear.yml")
    assert "methods" not in recipe.model_dump(exclude_none=True)
    assert make_plan(recipe).digest != make_plan(recipe, methods=[here / "own.py"]).digest


# ------------------------------------------------------------------------------------------------- after the merge
@pytest.mark.parametrize("method", ["middle", "unit"])
def test_a_merge_is_replayed_without_the_file(method: str, here: Path, tmp_path: Path) -> None:
    run(plan_merge(here, method), tmp_path / "out", workers=0, threads=1)
    (here / "own.py").unlink()
    with parts_of(2 * BLOCK):
        assert verify(tmp_path / "out", replay=3, run_code=[sha256_of(CODE)]).replayed == 3
    output = FolderOutput(tmp_path / "out")
    (receipt, *_) = output.journal.read()
    flip_bit(tmp_path / "out" / receipt.shard, receipt.start_bytes)
    with pytest.raises(Exception, match="changed since they were written"):
        verify(tmp_path / "out")


def test_a_replay_runs_only_what_was_allowed_by_its_checksum(here: Path, tmp_path: Path) -> None:
    run(plan_merge(here), tmp_path / "out", workers=0, threads=1)
    for allowed in ([], [sha256_of(CODE + "\n")]):
        with pytest.raises(
            VerifyError, match=rf"out/own\.py: merging again runs its code; read it.*run_code=\['{sha256_of(CODE)}'\]"
        ):
            verify(tmp_path / "out", replay=1, run_code=allowed)
    assert verify(tmp_path / "out").replayed == 0


def test_a_replay_runs_no_file_but_what_the_output_keeps(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plan names a recipe beside which a file of that name may lie, of whomever."""
    run(plan_merge(here), tmp_path / "out", workers=0, threads=1)
    path, ran = tmp_path / "out" / ".mergemill" / "plan.json", tmp_path / "ran"
    record = json.loads(path.read_text())
    (here / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n{CODE}")
    path.write_text(json.dumps(record | {"code": {}, "recipe_name": str(here / "middle.yml")}))
    with pytest.raises(VerifyError, match=r"its plan keeps no text of 'own\.py', which its recipe runs"):
        verify(tmp_path / "out", replay=1, run_code=[sha256_of(CODE)])
    path.write_text(json.dumps(record | {"code": {"own.py": f"open({str(ran)!r}, 'w').close()"}}))
    with pytest.raises(VerifyError, match=r"out/own\.py: is not the code that the plan keeps of it"):
        verify(tmp_path / "out", replay=1, run_code=[sha256_of(CODE)])
    assert not ran.exists()
    path.write_text(json.dumps(record))
    with parts_of(2 * BLOCK):
        assert execute(["verify", str(tmp_path / "out"), "--replay", "1"]) == 0
    assert f"merging again runs the code of own.py (sha256 {sha256_of(CODE)})" in capsys.readouterr().err


def test_the_output_holds_the_file_so_that_its_recipe_works(here: Path, tmp_path: Path) -> None:
    run(plan_merge(here), tmp_path / "out", workers=0, threads=1)
    out = tmp_path / "out"
    assert (out / "own.py").read_text() == CODE
    card = (out / "README.md").read_text()
    (file,) = plan_merge(here).origin.code
    assert f"`own.py`, sha256 `{file.sha256}`" in card
    assert "**Own: methods with helpers" not in card, "of a file with several methods the function says what it is"
    shutil.rmtree(here)
    again = make_plan(load_recipe(out / "recipe.yml"))
    assert [file.text for file in again.origin.code] == [CODE]
    run(again, tmp_path / "again", workers=0, threads=1)
    assert hash_output(tmp_path / "again") == hash_output(out)


def test_a_file_in_a_folder_below_the_recipe_is_copied_there(here: Path, tmp_path: Path) -> None:
    (here / "lib").mkdir()
    (here / "own.py").rename(here / "lib" / "own.py")
    (here / "middle.yml").write_text((here / "middle.yml").read_text().replace("own.py", "./lib/own.py"))
    run(plan_merge(here), tmp_path / "out", workers=0, threads=1)
    assert (tmp_path / "out" / "lib" / "own.py").read_text() == CODE
    assert make_plan(load_recipe(tmp_path / "out" / "recipe.yml")).origin.code[0].name == "lib/own.py"


# ------------------------------------------------------------------------------------------- other ways to give it
def test_a_file_can_be_given_beside_the_recipe(here: Path, tmp_path: Path) -> None:
    plain = (here / "middle.yml").read_text().replace("methods: own.py\n", "")
    (here / "plain.yml").write_text(plain)
    with pytest.raises(PlanError, match="unknown merge_method 'middle'"):
        make_plan(load_recipe(here / "plain.yml"))
    for given in (here / "own.py", str(here / "own.py"), MethodsFile("own.py", "own.py", CODE)):
        plan = make_plan(load_recipe(here / "plain.yml"), methods=[given])
        assert [file.name for file in plan.origin.code] == ["own.py"]
        assert not plan.warnings, "who gives a file knows of it"
    merge(here / "plain.yml", tmp_path / "out", methods=[here / "own.py"], workers=0)
    assert verify(tmp_path / "out", replay=1, run_code=[sha256_of(CODE)]).replayed == 1


def test_a_decorated_function_stands_for_its_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(here))
    import own

    plain = here / "plain.yml"
    plain.write_text((here / "middle.yml").read_text().replace("methods: own.py\n", ""))
    assert make_plan(load_recipe(plain), methods=[own.middle]).origin.code[0].text == CODE
    result = merge_tensors([torch.ones(3)], own.middle, base=torch.zeros(3))
    assert result.tolist() == [0.5] * 3


def test_a_function_without_a_file_is_refused() -> None:
    def first(models: list[torch.Tensor]) -> torch.Tensor:
        return models[0]

    space = {"torch": torch, "merge_method": merge_method, "__name__": "session"}
    exec("@merge_method(reads='element')\ndef first(models): return models[0]", space)
    for given in (first, len, space["first"]):
        with pytest.raises(MethodsError, match="is no merge method from a file; write it into one"):
            open_methods([given])  # type: ignore[list-item]


# ----------------------------------------------------------------------------------------------- what can be wrong
WRONG = {
    "no method": ("x = 1\n", r"own.py: holds no merge method; decorate a function with @merge_method\(...\)"),
    "syntax": ("x = 1\ndef f(:\n", r"own.py:2: invalid syntax"),
    "raises": ("x = 1\n\n\ndef f():\n    return 1 / 0\n\n\nf()\n", r"own.py:5: ZeroDivisionError: division by zero"),
    "no such module": ("import nowhere_at_all\n", r"own.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "an unknown input": (
        CODE.replace("base: Tensor, deltas", "bsae: Tensor, deltas"),
        r"own.py:2\d: TypeError: middle: unknown input 'bsae'; a method takes models, deltas",
    ),
    "a built-in's name": (CODE.replace("def middle", "def ties"), r"own.py:2\d: 'ties' is the name of a built-in met"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line_before_anything_is_written(case: str, here: Path, tmp_path: Path) -> None:
    text, words = WRONG[case]
    (here / "own.py").write_text(text)
    with pytest.raises(MethodsError, match=words) as raised:
        merge(here / "middle.yml", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_one_that_is_no_text_are_named(here: Path) -> None:
    (here / "own.py").write_bytes(b"\xff\xfe")
    with pytest.raises(MethodsError, match=r"own.py: is not UTF-8 text"):
        plan_merge(here)
    (here / "own.py").unlink()
    with pytest.raises(MethodsError, match=r"own.py: cannot be read: No such file or directory"):
        plan_merge(here)


def test_two_files_with_one_method_or_one_name_are_an_error(here: Path, tmp_path: Path) -> None:
    (here / "other.py").write_text(CODE + "# another\n")
    with pytest.raises(MethodsError, match=r"other.py:\d+: a method 'middle' is in another file of methods already"):
        find_all_methods(open_methods([here / "own.py", here / "other.py"]))
    (tmp_path / "own.py").write_text(CODE.replace("middle", "between").replace("unit", "norm"))
    with pytest.raises(MethodsError, match=r"another file of methods is called own.py too"):
        make_plan(load_recipe(here / "middle.yml"), methods=[tmp_path / "own.py"])


@pytest.mark.parametrize("name", ["../own.py", "/tmp/own.py", "https://x/own.py", "own.txt", "~/own.py", "C:own.py", 3])
def test_a_recipe_names_files_below_its_folder_only(name: object, here: Path) -> None:
    (here / "middle.yml").write_text(
        f"merge_method: middle\nmodels: [{{model: ../a}}]\nmethods: [{json.dumps(name)}]\n"
    )
    with pytest.raises(RecipeError, match=r"middle.yml:3: .*(Python file below the recipe's folder|of a Python file)"):
        load_recipe(here / "middle.yml")


def test_a_recipe_warns_of_the_code_that_it_runs(here: Path) -> None:
    plan = plan_merge(here)
    (warning,) = [warning for warning in plan.warnings if "code" in warning]
    assert warning == (
        f"{here}/middle.yml: runs the code of own.py beside it, here and on every worker "
        f"(sha256 {plan.origin.code[0].sha256})"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_task_names_the_line_of_the_file_and_the_tensor(workers: int, here: Path, tmp_path: Path) -> None:
    (here / "own.py").write_text(CODE.replace("tensor.mul_(Share(HALF).of)", "tensor.mul_(HALF).view(7, 11)"))
    words = r"own.py:2\d: RuntimeError: shape '\[7, 11\]' is invalid .* \([\w., ]+, read from .*\); with another"
    with pytest.raises(RunError, match=words):
        run(plan_merge(here), tmp_path / "out", workers=workers, threads=1)


RAISES = {
    "unpicklable": "raise_(lambda: 1)",
    "chained": "raise_chained()",
    "mute": "raise_mute()",
    "exits": "raise_(SystemExit(3))",
    "deep": "deep()",
}
RAISING = """
class Odd(Exception):
    def __init__(self, held: object) -> None:
        super().__init__("odd")
        self.held = held

    def __reduce__(self) -> str:
        raise ValueError("it cannot be sent")


class Mute(Odd):
    def __str__(self) -> str:
        raise ValueError("it cannot be said")

    __repr__ = __str__


def raise_(held: object) -> None:
    raise held if isinstance(held, SystemExit) else Odd(held)


def raise_chained() -> None:
    error = ValueError("first")
    for _ in range(5000):
        after = ValueError("later")
        after.__cause__ = error
        error = after
    raise error


def raise_mute() -> None:
    raise Mute(1)


def deep() -> None:
    deep()

"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", RAISES)
def test_an_error_that_cannot_be_sent_ends_the_run_with_one_error(case: str, here: Path, tmp_path: Path) -> None:
    code = CODE.replace("HALF = 0.5\n", f"HALF = 0.5\n{RAISING}")
    (here / "own.py").write_text(code.replace("    return base.add_", f"    {RAISES[case]}\n    return base.add_"))
    with pytest.raises(RunError, match=r"own.py:\d+: \w+: .*read from .*; with another file") as caught:
        run(plan_merge(here), tmp_path / "out", workers=1, threads=1)
    assert "\n" not in str(caught.value)

"""Files without which an output cannot be loaded: its code and its modules."""

from pathlib import Path
from typing import Any

import pytest
from models import write_json
from plan.sketches import config, llama, plan_of, read_file, write_sketch

from mergemill.engine.checkpoint import copied_files, open_checkpoint
from mergemill.engine.checkpoint.needed import Needed, find_needed

CODE = {"modeling_x.py": "from .layers_x import Layer\n", "layers_x.py": "raise SystemExit('run')\n"}
MAP = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
POOLING = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def write(folder: Path, *, code: dict[str, str] | None = None, **more: Any) -> Path:
    write_sketch(folder, llama(), config=config(**more))
    for name, text in (code or {}).items():
        (folder / name).write_text(text)
    return folder


def test_code_that_the_config_names_is_copied_with_what_it_imports_and_never_run(tmp_path: Path) -> None:
    write(tmp_path / "a", code=CODE, auto_map=MAP)
    plan = plan_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]})
    assert {name: read_file(plan, name).decode() for name in CODE} == CODE
    assert plan.warnings == ()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_another_config_names_is_copied_too(tmp_path: Path, file: str) -> None:
    write(tmp_path, code=CODE)
    write_json(tmp_path / file, {"auto_map": {"AutoTokenizer": ["modeling_x.XTokenizer", None]}})
    assert find_needed(open_checkpoint(str(tmp_path))).present == ("layers_x.py", "modeling_x.py")


def test_code_that_nothing_names_and_code_that_lies_elsewhere_is_left(tmp_path: Path) -> None:
    write(tmp_path, code=CODE, auto_map={"AutoModel": "org/name--modeling_x.X"})
    found = open_checkpoint(str(tmp_path))
    assert find_needed(found) == Needed((), ())


def test_code_that_is_not_there_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a", auto_map=MAP)
    (warning,) = plan_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}).warnings
    assert "names modeling_x.py and does not have it" in warning


def test_modules_of_sentence_transformers_are_copied_with_their_folders(tmp_path: Path) -> None:
    write(tmp_path)
    write_json(tmp_path / "modules.json", POOLING)
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    found = open_checkpoint(str(tmp_path))
    assert find_needed(found).present == ("1_Pooling/config.json", "modules.json")
    assert find_needed(found).missing == ("2_Dense/config.json",)


@pytest.mark.parametrize(
    "modules", [[{"path": "../x"}], [{"path": "/etc"}], [{"path": "a/b"}], [{"path": 1}], {"path": "x"}, [[]], "x"]
)
def test_modules_that_are_none_or_lie_outside_are_not_looked_for(tmp_path: Path, modules: Any) -> None:
    write(tmp_path)
    write_json(tmp_path / "modules.json", modules)
    assert find_needed(open_checkpoint(str(tmp_path))).present == ()


def test_configs_of_processors_and_pooling_are_copied() -> None:
    names = [
        "config_sentence_transformers.json",
        "image_processor_config.json",
        "normalizer.json",
        "preprocessor_config.json",
        "sentence_bert_config.json",
        "video_preprocessor_config.json",
    ]
    assert copied_files([*names, "training_config.json"]) == tuple(names)


def test_a_models_own_way_to_generate_is_copied(tmp_path: Path) -> None:
    """transformers runs ``custom_generate/generate.py`` of a model for which its user trusts remote code."""
    write(tmp_path / "a")
    (tmp_path / "a" / "custom_generate").mkdir()
    (tmp_path / "a" / "custom_generate" / "generate.py").write_text("def generate(model): ...\n")
    plan = plan_of({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]})
    assert read_file(plan, "custom_generate/generate.py") == b"def generate(model): ...\n"

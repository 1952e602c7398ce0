"""``mergemill demo``: small checkpoints, merged; the shortest way to see what mergemill does.

Its own recipe joins two variants of a base; with ``--recipe`` it is one of those in ``configs/recipes``, which come
with the package, and the models are those that it names.
"""

import json as json_text
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergemill.cli import console
from mergemill.cli.completion import complete_example
from mergemill.cli.demo_models import DemoModel, write_demo_model
from mergemill.cli.options import Json

if TYPE_CHECKING:
    from mergemill.engine import events

Folder = Annotated[
    Path | None, typer.Argument(metavar="[FOLDER]", help="New or empty; else mergemill-demo, or mergemill-demo-NAME.")
]
Example = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME", help="One of the examples, such as slerp.", autocompletion=complete_example
    ),
]

MARK = "# mergemill demo"
ELSEWHERE = "choose another place: mergemill demo {}other-folder"
RECIPE = """\
# TIES: two variants of a base.
merge_method: ties
base_model: models/base
models:
  - model: models/variant-a
    parameters: {weight: 0.6, density: 0.5}
  - model: models/variant-b
    parameters: {weight: 0.4, density: 0.5}
dtype: bfloat16
"""
_MODEL = re.compile(r"\bmodels/([\w-]+)")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a demo shows."""

    name: str  # of an example; empty: the demo's own recipe
    folder: Path
    text: str  # of the recipe
    models: Sequence[DemoModel]
    beside: Sequence[str] = ()  # files that the recipe names

    @property
    def option(self) -> str:
        """The words that ask for it, with a space after them."""
        return f"--recipe {self.name} " if self.name else ""


def demo(folder: Folder = None, recipe: Example = None, json: Json = False) -> None:
    """Make small models and merge them.

    Example: mergemill demo mergemill-demo
    """
    from mergemill.engine import load_recipe, make_plan, run, verify

    shown = choose(folder, recipe)
    _check_folder(shown)
    _write_recipe(shown)
    for model in shown.models:
        write_demo_model(shown.folder / "models" / model.name, model)
    plan = make_plan(load_recipe(shown.folder / "recipe.yml"))
    committed = run(plan, shown.folder / "merged")
    verify(shown.folder / "merged")
    if json:
        console.say_json(asdict(committed))
        return
    for line in story(shown, plan.origin.title, committed):
        console.say(line)


def choose(folder: Path | None, name: str | None) -> Shown:
    """Return what is shown, and where; `BadParameter` for a name that no example has."""
    if name is None:
        place = folder or Path("mergemill-demo")
        return Shown("", place, _put_below(RECIPE, place), _list_models(RECIPE, layers=6))
    if name not in (known := list_examples()):
        raise typer.BadParameter(f"no example is called {name!r}; there are {', '.join(known)}")
    place = folder or Path(f"mergemill-demo-{name}")
    text = _examples().joinpath(f"{name}.yml").read_text("utf-8")
    beside = re.findall(r"^methods: (\S+\.py)$", text, re.MULTILINE)
    return Shown(name, place, _put_below(text, place), _list_models(text, layers=8), beside)


def list_examples() -> list[str]:
    """Return the names of the examples."""
    return sorted(file.name.removesuffix(".yml") for file in _examples().iterdir() if file.name.endswith(".yml"))


def _examples() -> Any:
    return resources.files("mergemill.configs").joinpath("recipes")


def _put_below(text: str, folder: Path) -> str:
    """Return a recipe whose models lie in a folder's `models`.

    >>> _put_below("models: [{model: models/base}]", Path("my demo"))
    'models: [{model: "my demo/models/base"}]'
    """
    return _MODEL.sub(lambda found: json_text.dumps(str(folder / "models" / found[1]), ensure_ascii=False), text)


def _list_models(text: str, *, layers: int) -> list[DemoModel]:
    """Return the models that a recipe names, as their names say: what is called small has half the layers."""
    made = []
    for name in sorted(set(_MODEL.findall(text))):
        start = "small-" if name.startswith("small-") else ""
        made.append(
            DemoModel(
                name,
                layers // 2 if start else layers,
                tied="untied" not in name,
                dtype="float16" if name.endswith("fp16") else "bfloat16",
                base="" if name == f"{start}base" else f"{start}base",
            )
        )
    return made


def _check_folder(shown: Shown) -> None:
    """Refuse a folder that holds anything but this demo."""
    folder, elsewhere = shown.folder, ELSEWHERE.format(shown.option)
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file; {elsewhere}")
    recipe = folder / "recipe.yml"
    head = _write_head(shown).encode()
    ours = recipe.is_file() and recipe.read_bytes().startswith(head)
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise typer.BadParameter(f"{folder} holds other files; {elsewhere}")


def _write_head(shown: Shown) -> str:
    return f"{MARK} {shown.option}".rstrip() + "; paths are relative to the folder in which mergemill is started\n"


def _write_recipe(shown: Shown) -> None:
    """Write the recipe first: it marks the folder as ours."""
    shown.folder.mkdir(parents=True, exist_ok=True)
    for name in shown.beside:
        (shown.folder / name).write_text(_examples().joinpath(name).read_text("utf-8"), encoding="utf-8")
    if not (shown.folder / "recipe.yml").exists():
        (shown.folder / "recipe.yml").write_text(_write_head(shown) + shown.text, encoding="utf-8")


def story(shown: Shown, title: str, committed: "events.Committed") -> Iterator[str]:
    """Yield what happened and what to try next."""
    folder = shown.folder
    recipe, merged = shlex.quote(str(folder / "recipe.yml")), shlex.quote(str(folder / "merged"))
    if committed.redone_parts:
        millions = max(model.parameters for model in shown.models) / 1e6
        made = console.count(len(shown.models), "Llama model")
        yield f"Made {made} of {millions:.1f} M parameters in {folder / 'models'}: {_join(shown.models)}."
        yield f"Merged them with {title}, as {recipe} says, in {committed.seconds:.1f} s."
        yield f"Verified {merged}: every byte is as it was written."
    else:
        other = shlex.quote(f"{folder}-2")
        again = f"mergemill demo {shown.option}{other}"
        yield f"{folder} holds the demo already, finished and verified; for a new one: {again}"
    yield ""
    yield "Try next:"
    yield f"  mergemill plan {recipe}"
    yield f"  mergemill inspect {merged}"
    yield f"  mergemill verify {merged} --replay 2"
    if shown.name:
        yield "  mergemill methods"
    else:
        yield "  mergemill demo --recipe slerp"


def _join(models: Sequence[DemoModel]) -> str:
    return ", ".join(model.name for model in models)

"""``mergemill recipe …``: commands that write a recipe, and merge nothing."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergemill.cli import console
from mergemill.cli.completion import complete_method
from mergemill.cli.groups import GroupedCommand
from mergemill.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

app = typer.Typer(
    name="recipe",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Write a recipe: mergemill recipe … | mergemill merge - OUT",
)

Output = Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to stdout.")]
Dtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="The dtype that is written, such as bfloat16.")]
Drawn = Annotated[list[str], typer.Option("--model", "-m", metavar="MODEL", help="A model that layers are drawn from.")]
Shares = Annotated[
    list[float] | None, typer.Option("--weight", "-w", metavar="W", help="Of each model; none: all alike.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the draw.")]
FullRandom = Annotated[bool, typer.Option("--full-random", help="Layers of each model at random, in any order.")]
Merged = Annotated[list[str], typer.Option("--merge", metavar="MODEL", help="A model that is merged.")]
Base = Annotated[str | None, typer.Option("--base-model", metavar="MODEL", help="What task vectors are taken from.")]
Method = Annotated[str, typer.Option(metavar="NAME", help="The merge method.", autocompletion=complete_method)]
Weights = Annotated[list[float] | None, typer.Option("--weight", metavar="W", help="One for all, or one a model.")]
Densities = Annotated[list[float] | None, typer.Option("--density", metavar="D", help="One for all, or one a model.")]
NoNormalize = Annotated[bool, typer.Option("--no-normalize", help="Weights are taken as they are.")]
Int8Mask = Annotated[bool, typer.Option("--int8-mask", help="Does nothing, as in a recipe.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Write bfloat16.")]
NaiveCount = Annotated[bool, typer.Option("--naive-count", help="No method takes it; the error says what would do.")]


@app.command(cls=GroupedCommand)
def layershuffle(
    model: Drawn,
    weight: Shares = None,
    seed: Seed = 0,
    full_random: FullRandom = False,
    dtype: Dtype = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Write a stack of layers that are drawn from models.

    Example: mergemill recipe layershuffle -m models/a -m models/b -w 0.7 -w 0.3 | mergemill merge - shuffled
    """
    from mergemill.engine import writers

    layers = {each: _count_layers(each) for each in model}
    _give(
        writers.shuffle_layers(layers, weight or [], seed=seed, full_random=full_random, dtype=dtype), output, json=json
    )


@app.command(cls=GroupedCommand)
def bakllama(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file with layer_slices.")],
    output: Output = None,
    json: Json = False,
) -> None:
    """Write what a file of bakllama means.

    Example: mergemill recipe bakllama stack.yml -o recipe.yml
    """
    from mergemill.engine import writers

    _give(writers.read_bakllama(file), output, json=json)


@app.command(cls=GroupedCommand)
def legacy(
    merge: Merged,
    base_model: Base = None,
    method: Method = "ties",
    weight: Weights = None,
    density: Densities = None,
    no_normalize: NoNormalize = False,
    int8_mask: Int8Mask = False,
    bf16: Bf16 = False,
    naive_count: NaiveCount = False,
    output: Output = None,
    json: Json = False,
) -> None:
    """Write what the words of mergekit-legacy mean.

    Example: mergemill recipe legacy --merge models/a --merge models/b --base-model models/base --density 0.5
    """
    from mergemill.engine import errors, writers

    if naive_count:
        raise errors.RecipeError("--naive-count: no method counts signs; ties weighs them, magmax takes the largest")
    asked = writers.Legacy(
        merge,
        method,
        base=base_model,
        weights=weight or (),
        densities=density or (),
        normalize=not no_normalize,
        int8_mask=int8_mask,
        dtype="bfloat16" if bf16 else None,
    )
    _give(writers.write_legacy(asked), output, json=json)


def _count_layers(model: str) -> int:
    from mergemill.engine import errors, inspect

    layers = inspect(model).layers
    if len(layers) != 1:
        found = ", ".join(f"{name} ({count})" for name, count in layers.items()) or "none"
        raise errors.RecipeError(f"{model}: layers are drawn from models with one stack of layers; here are: {found}")
    return next(iter(layers.values()))


def _give(recipe: "Mapping[str, Any]", output: str | None, *, json: bool) -> None:
    from mergemill.engine import writers

    text = writers.write_text(recipe)  # which reads it back
    if json:
        text = dumps(recipe, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        console.say_whole(text.rstrip("\n"))
    else:
        Path(output).write_text(text)

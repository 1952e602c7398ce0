"""Everything that is read and may be anybody's, as functions of bytes: the one table of what is fuzzed.

A target does with the bytes what mergemill does with such a file, and asks of the result what must hold. It raises
nothing but the errors that it names, each a kind of `MergemillError` with a message of one line; anything else that it
raises is a finding, and so is one that takes long.
"""

import functools
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import safetensors
from models import write_llama
from offers.quantized import read_expression

from mergemill.cli.status import list_facts, say_progress
from mergemill.engine import cancel, inspect, load_recipe, make_plan, status
from mergemill.engine.checkpoint.ancestors import read_lineage
from mergemill.engine.checkpoint.card import Card, make_card
from mergemill.engine.checkpoint.checkpoint import open_checkpoint
from mergemill.engine.checkpoint.family import choose_family
from mergemill.engine.checkpoint.gguf.opening import open_gguf, write_config
from mergemill.engine.checkpoint.header import parse_header
from mergemill.engine.checkpoint.index import check_index, check_shards, parse_index
from mergemill.engine.checkpoint.layout import DTYPE_BITS
from mergemill.engine.checkpoint.pickles.pickled import read_pickled
from mergemill.engine.checkpoint.terms import parse_front_matter, read_terms
from mergemill.engine.errors import (
    CheckpointError,
    HeaderError,
    IndexFileError,
    InputError,
    MergeError,
    MergemillError,
    OutputError,
    PickledError,
    PlanError,
    RecipeError,
    RunError,
)
from mergemill.engine.offers.formats import open_offers
from mergemill.engine.plan.inputs import check_input
from mergemill.engine.plan.values import Plan
from mergemill.engine.recipe import parse_cluster, parse_recipe, recipe_to_json
from mergemill.engine.runs.attach import attach
from mergemill.engine.runs.driver import Driver, find_request, read_driver
from mergemill.engine.runs.outputs.bucket import parse_uploads
from mergemill.engine.runs.outputs.folder import FolderOutput
from mergemill.engine.runs.outputs.lease import Lease
from mergemill.engine.runs.outputs.receipts import Receipt, parse_lines, parse_receipts
from mergemill.engine.runs.outputs.record import parse_record
from mergemill.engine.runs.tasks.guard import make_report
from mergemill.engine.storage.ranges import pin_file
from mergemill.engine.storage.store import ENVIRONMENT

PAD_BYTES = 1 << 16  # of data that a header may be given to be compared with safetensors


@dataclass(frozen=True, slots=True)
class Target:
    """What is done with bytes, and what may come of it."""

    use: Callable[[bytes], None]
    errors: tuple[type[MergemillError], ...]  # that it may raise
    words: tuple[str, ...] = ()  # for a fuzzer to build inputs of


def try_target(name: str, data: bytes) -> None:
    """Give bytes to a target; raises what is a finding."""
    target = TARGETS[name]
    try:
        target.use(data)
    except target.errors as error:
        told = str(error)
        assert told.strip(), "an error without a message"
        assert len(told.split("\n")) == 1, "an error of several lines"


def use_header(data: bytes) -> None:
    """A header of a file that is as long as its tensors say; what is taken is what safetensors takes."""
    ends = [int(end[:18]) for end in re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d+)', data)]
    size_bytes = 8 + int.from_bytes(data[:8], "little") if len(data) >= 8 else len(data)
    padded = data[:size_bytes] + bytes(min(max(ends, default=0), PAD_BYTES)) if size_bytes <= len(data) else data
    header = parse_header(padded, file_bytes=len(padded), where="model.safetensors")
    assert sum(tensor.nbytes for tensor in header.tensors) == len(padded) - header.size_bytes
    there = dict(safetensors.deserialize(padded))
    assert {tensor.name: list(tensor.shape) for tensor in header.tensors} == {
        name: list(found["shape"]) for name, found in there.items()
    }


def use_pickle(data: bytes) -> None:
    """A file of ``torch.save``: what is taken of it lies in it."""
    path = _find_folder() / "x.pt"
    path.write_bytes(data)
    tensors, left_out = read_pickled(pin_file(path), where="x.pt")
    assert tensors
    assert len(left_out.split("\n")) == 1
    for each in tensors:
        assert 0 <= each.offset_bytes <= each.offset_bytes + each.nbytes <= len(data)
        assert each.axes is None or sorted(each.axes) == list(range(len(each.shape)))


def use_gguf(data: bytes) -> None:
    """A GGUF file: what is taken of it lies in it, apart from the others."""
    path = _find_folder() / "x.gguf"
    path.write_bytes(data)
    model = open_gguf(pin_file(path), "x.gguf", ENVIRONMENT)
    assert model.tensors.keys() == model.facts.keys()
    places = sorted((each.offset_bytes, each.offset_bytes + each.nbytes) for each in model.tensors.values())
    assert all(stop <= len(data) for _, stop in places)
    assert all(one[1] <= other[0] for one, other in pairwise(places))
    assert isinstance(json.loads(write_config(model.config)), dict)


def use_quantized(data: bytes) -> None:
    """A line of a config, and one of dtype, shape and content by name: what is offered of such a model can be read.

    Tensors without a content are random. What an expression says that it takes is all that it is given.
    """
    said, _, lies = data.partition(b"\n")
    entries, at, weights = {}, 0, bytearray(random.Random(len(data)).randbytes(PAD_BYTES))
    for name, (dtype, shape, content) in _read_entries(lies).items():
        size_bytes = math.prod(shape) * DTYPE_BITS.get(dtype, 8) // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at := at + size_bytes]}
        if at > PAD_BYTES:
            return
        if content:
            weights[at - size_bytes : at] = content[:size_bytes].ljust(size_bytes, b"\0")
    header = json.dumps(entries).encode()
    folder = _find_folder() / "quantized"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights[:at])
    (folder / "config.json").write_bytes(said)
    checkpoint = open_checkpoint(str(folder))
    family = choose_family(checkpoint.config)
    offers = open_offers({"model": checkpoint}, family, {})["model"]
    check_input(checkpoint, offers, family, "model")
    for offer in offers.values():
        if 0 < offer.expression.size <= PAD_BYTES and offer.expression.count_rounds() == (0, 0):
            read_expression(offer.expression, "F32", 1 + offer.expression.size // 2)


def _read_entries(lies: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtypes, shapes and contents; none where they are no such, which is a header's matter."""
    try:
        kept = {
            str(name): (str(dtype), [int(size) for size in shape], "".join(content).encode("latin-1"))
            for name, (dtype, shape, *content) in json.loads(lies).items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: each for name, each in kept.items() if all(0 <= size <= PAD_BYTES for size in each[1])}


SHARDS = {"model-00001-of-00002.safetensors": {"a", "b"}, "model-00002-of-00002.safetensors": {"c"}}


def use_index(data: bytes) -> None:
    """An index beside shards that are there."""
    weight_map = parse_index(data, where="index")
    held = {shard: SHARDS[shard] for shard in check_shards(weight_map, SHARDS, where="index")}
    check_index(weight_map, held, where="index")


def use_config(data: bytes) -> None:
    """A config of both inputs, of a merge that keeps all layers and of one that does not."""
    a, b = _find_models()
    for model in (a, b):
        (model / "config.json").write_bytes(data)
    whole = {"merge_method": "linear", "models": [_weigh(a), _weigh(b)], "dtype": "float16"}
    sliced = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(a), "layer_range": [low, 2]}]} for low in (0, 1)],
    }
    for recipe in (whole, sliced):
        for file in make_plan(load_recipe(recipe)).files:
            if file.name == "config.json":
                assert file.data is not None
                json.loads(file.data)


def use_card(data: bytes) -> None:
    """A card of an input: its licence is read, and written into the output's."""
    parse_front_matter(data.decode(errors="replace"))
    assert all(text.isprintable() for text in read_lineage("m", data.decode(errors="replace")).bases)
    model = _find_models()[0]
    (model / "README.md").write_bytes(data)
    (model / "config.json").write_text("{}")
    terms = read_terms(open_checkpoint(str(model)))
    told = Card(
        title="a",
        method_title="b",
        method_source="c",
        models=["d"],
        recipe_text="e",
        dtypes=["F32"],
        tensor_count=1,
        parameter_count=1,
        terms={"d": terms},
    )
    written = parse_front_matter(make_card(told))
    assert {key: written.get(key) for key in terms.license_fields} == terms.license_fields


def use_recipe(data: bytes) -> None:
    """A recipe: what is understood of it is understood again as it is written down."""
    recipe = parse_recipe(_decode(data, RecipeError))
    written = recipe_to_json(recipe)
    assert recipe_to_json(load_recipe(json.loads(json.dumps(written)))) == written


def use_cluster(data: bytes) -> None:
    """A cluster file."""
    parse_cluster(_decode(data, RecipeError))


def use_record(data: bytes) -> None:
    """A plan of an output, damaged or another's: looked at, and asked whether a merge may go on."""
    out, plan = _find_output()
    _replace(out, "plan.json", data)
    _look(out)
    output = FolderOutput(out)
    output.list_state()
    record = output.read_record()
    assert record is not None
    assert parse_record(record.to_json(), "again").to_json() == record.to_json()
    record.describe_difference(parse_record(_find_notes()["plan.json"], "own"))
    output.open(plan)


def use_journal(data: bytes) -> None:
    """A journal of a folder, or of objects: what is trusted of it are parts of the plan."""
    out, plan = _find_output()
    for receipt in (*parse_lines(data), *(parse_receipts(data) or ())):
        assert [*map(_write, parse_lines(_write(receipt)))] == [_write(receipt)]
    _replace(out, "journal.jsonl", data)
    _look(out)
    output = FolderOutput(out)
    list(output.journal.follow())
    kept = output.start(plan)
    assert all(receipt.part == number < len(plan.parts) for number, receipt in kept.items())
    make_report(plan, kept.values())


def use_driver(data: bytes) -> None:
    """The note of who drives a merge, or of who asks it to end."""
    out, _ = _find_output()
    output = FolderOutput(out)
    _replace(out, "cancel", data)
    assert isinstance(find_request(output.notes, "t"), str)
    _replace(out, "driver.json", data)
    driver = read_driver(output.notes)
    assert driver is None or isinstance(driver, Driver)
    _look(out)


def use_lease(data: bytes) -> None:
    """The lock of an output in object storage: taken where its holder is gone."""
    objects = _Held(data)
    for age_s in (0.0, 1e9):
        objects.age_s = age_s
        Lease(objects, "s3://b/lock", "s3://b").take()


def use_uploads(data: bytes) -> None:
    """The note of what is being uploaded."""
    found = parse_uploads(data, "s3://b/uploads.json", "s3://b")
    assert all(isinstance(text, str) for pair in found.items() for text in pair)


@dataclass(slots=True)
class _Held:
    """Object storage with one object in it; see `Objects`."""

    data: bytes
    age_s: float = 0.0

    def put(self, url: str, data: bytes, *, absent: bool = False, error: type[MergemillError] = OutputError) -> bool:
        if not absent:
            self.data = data
        return not absent

    def get(self, url: str, *, error: type[MergemillError] = OutputError) -> bytes | None:
        return self.data

    def get_all(self, urls: Sequence[str]) -> list[bytes | None]:
        return [self.data for _ in urls]

    def get_age(self, url: str) -> float | None:
        return self.age_s

    def delete(self, urls: Sequence[str]) -> None:
        pass

    def list_objects(self, url: str, *, error: type[MergemillError] = OutputError) -> Mapping[str, int]:
        return {}


def _look(out: Path) -> None:
    """Do with an output what only looks at it."""
    with suppress(InputError, RunError):
        found = status(out)
        say_progress(found)
        list(list_facts(found, ""))
    for look in (inspect, functools.partial(cancel, wait_s=0), attach):
        with suppress(InputError, RunError):
            look(out)


def _decode(data: bytes, error: type[MergemillError]) -> str:
    """Return text; bytes that are none are refused where files are read."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise error("recipe.yml:1: not UTF-8 text") from None


def _write(receipt: Receipt) -> bytes:
    return json.dumps(asdict(receipt)).encode()


def _weigh(model: Path) -> dict[str, object]:
    return {"model": str(model), "parameters": {"weight": 1.0}}


def _replace(out: Path, name: str, data: bytes) -> None:
    """Give an output one note, and leave all others as they were."""
    state = out / ".mergemill"
    for other in state.iterdir():
        if other.name not in _find_notes() and other.name != name and ".tmp-" not in other.name:
            other.unlink()
    for other, text in _find_notes().items():
        (state / other).write_bytes(data if other == name else text)
    if name not in _find_notes():
        (state / name).write_bytes(data)


@functools.cache
def _find_folder() -> Path:
    """Make a folder that lasts as long as the process."""
    _kept.append(tempfile.TemporaryDirectory(prefix="mergemill-fuzz-"))
    return Path(_kept[-1].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _find_models() -> tuple[Path, Path]:
    a = write_llama(_find_folder() / "a", seed=1, layers=2, hidden=8, heads=2, intermediate=8, vocab=8)
    return a, write_llama(_find_folder() / "b", seed=2, layers=2, hidden=8, heads=2, intermediate=8, vocab=8, near=a)


@functools.cache
def _find_output() -> tuple[Path, Plan]:
    """Return an unfinished output, and the plan of it, whose inputs are never changed."""
    models = [
        write_llama(_find_folder() / name, seed=1, layers=2, hidden=8, heads=2, intermediate=8, vocab=8)
        for name in ("c", "d")
    ]
    recipe = load_recipe({"merge_method": "linear", "models": [_weigh(model) for model in models]})
    plan = make_plan(recipe, shard_size="2KB")
    out = _find_folder() / "out"
    output = FolderOutput(out)
    output.make_state()
    output.start(plan)
    return out, plan


@functools.cache
def _find_notes() -> Mapping[str, bytes]:
    """Return what lies beside the output at first."""
    state = _find_output()[0] / ".mergemill"
    return {name: (state / name).read_bytes() for name in ("plan.json", "journal.jsonl")}


TARGETS: Mapping[str, Target] = {
    "header": Target(use_header, (HeaderError,), ('"dtype"', '"shape"', '"data_offsets"', "__metadata__", "BF16")),
    "pickle": Target(use_pickle, (PickledError,), ("collections\nOrderedDict\n", "_rebuild_tensor_v2", "PK")),
    "gguf": Target(use_gguf, (CheckpointError,), ("GGUF", "general.architecture", "token_embd.weight")),
    "quantized": Target(
        use_quantized,
        (CheckpointError, PlanError, MergeError),
        (
            "_scale_inv",
            "_blocks",
            "_scales",
            ".qweight",
            ".qzeros",
            ".g_idx",
            ".absmax",
            ".quant_map",
            "SCB",
            "F8_E4M3",
        ),
    ),
    "index": Target(use_index, (IndexFileError,), ('"weight_map"', *SHARDS)),
    "config": Target(use_config, (CheckpointError, PlanError), ("num_hidden_layers", "layer_types", "text_config")),
    "card": Target(use_card, (), ("---\n", "license: ", "license_name: ", "<<: *a", "&a ", "!!binary ")),
    "recipe": Target(use_recipe, (RecipeError,), ("merge_method: ", "models:\n- model: ", "<<: *a", "&a ", "!!float ")),
    "cluster": Target(use_cluster, (RecipeError,), ("kind: ", "workers: ", "options:", "<<: *a", "&a ")),
    "plan.json": Target(use_record, (OutputError,), ('"shards"', '"parts"', '"files"', '"sources"')),
    "journal": Target(
        use_journal, (OutputError,), ('"part"', '"drifts"', '"uploads"', '"copied"', '{"committed": true}')
    ),
    "driver.json": Target(use_driver, (), ('"token"', '"started"', '"committed"', '"ended"', '"by"')),
    "lease": Target(use_lease, (OutputError,), ('"processes"', '"pid"', '"started"', '"token"')),
    "uploads": Target(use_uploads, (OutputError,)),
}

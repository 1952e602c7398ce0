"""The rooms of the engine: who may import whom, the public face, what an import or a merge leaves alone."""

import ast
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from models import write_llama

import mergemill.cli
import mergemill.engine
from mergemill.engine import merge
from mergemill.engine.tensors import native

ENGINE = Path(mergemill.engine.__file__).parent
FILES = sorted(ENGINE.rglob("*.py"))

MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "recipe": {"errors", "storage"},
    "checkpoint": {"errors", "storage"},
    "tokens": {"errors", "storage", "checkpoint"},
    "tensors": {"errors", "storage"},
    "methods": {"errors", "storage", "tensors"},
    "transplants": {"errors", "storage", "tensors"},
    "offers": {"errors", "storage", "checkpoint", "tensors"},
    "forward": {"errors", "tensors"},
    "plan": {
        "errors",
        "storage",
        "recipe",
        "checkpoint",
        "tokens",
        "tensors",
        "methods",
        "transplants",
        "offers",
        "forward",
    },
    "runs": {"errors", "storage", "recipe", "checkpoint", "tensors", "methods", "transplants", "forward", "plan"},
    "reports": {"errors", "checkpoint", "tensors", "plan", "runs"},
    "conformance": {"errors", "storage", "recipe", "checkpoint", "tensors", "methods", "plan", "runs"},
    "evaluation": {"errors", "storage", "recipe", "checkpoint", "tensors", "forward", "plan", "runs"},
    "search": {"errors", "storage", "recipe", "tensors", "plan", "runs", "evaluation", "reports"},
}
"""The table of rooms, from the lowest to the highest: what each may import besides itself."""

INSIDE_RUNS = ["worker", "outputs", "tasks", "clusters", ""]
"""The folders of the room `runs`, from the lowest to the highest, which is the room itself."""

ONLY_IMPORTERS = {
    "dask": {"runs"},
    "distributed": {"runs"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "aiobotocore": {"storage"},
    "aiohttp": {"storage"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "huggingface_hub": {"storage"},
    "tokenizers": {"forward", "tokens"},
    "urllib3": {"storage"},
    "transformers": {"evaluation", "forward"},
    "pydantic": {"recipe", "runs"},  # what people wrote, and what lies beside an output
    "rich": {"runs"},
    "IPython": {"runs"},
    "cmaes": {"search"},
    "vl_convert": {"reports"},
    "optuna": {"search"},
    "yaml": {"recipe", "checkpoint", "runs", "storage"},  # storage: the loader of the others
}
"""Libraries that only some rooms know."""

FROM_FACE = re.compile(r"mergemill\.engine\.\w+")

NEVER = {
    "peft",
    "accelerate",
    "bokeh",
    "mergemill.cli",
    "typer",
}

FACE = [
    "PerModel",
    "abort",
    "attach",
    "cancel",
    "check_output",
    "check_places",
    "describe_environment",
    "describe_plan",
    "describe_slowness",
    "diff",
    "errors",
    "estimate_cost",
    "evaluate",
    "events",
    "find_terminal",
    "format_size",
    "format_time",
    "inspect",
    "jobs",
    "judge_transplants",
    "list_clusters",
    "list_code",
    "list_kept",
    "list_transplanted",
    "load_cluster",
    "load_document",
    "load_recipe",
    "load_storage",
    "make_adapter_plan",
    "make_convert_plan",
    "make_lora_plan",
    "make_plan",
    "make_raw_plan",
    "make_recipe",
    "make_transplant_plan",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "names_adapters",
    "open_lines",
    "open_terminal",
    "parse_adapters",
    "push",
    "read_recipe",
    "recipe_schema",
    "reports",
    "run",
    "searches",
    "status",
    "values",
    "verify",
    "writers",
]

NAMESPACES = ["errors", "events", "jobs", "methods", "reports", "searches", "values", "writers"]
"""Names of the face that are modules, of what belongs together."""


@cache
def list_imports(path: Path) -> tuple[str, ...]:
    """Return the full names of the modules that a file imports anywhere in it; read once for all tests."""
    return tuple(find_imports(path))


def find_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def find_room(path: Path) -> str:
    """Return the room that a file of the engine is in; its face is a room of its own."""
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down_the_table(room: str) -> None:
    files = [path for path in FILES if find_room(path) == room]
    assert files
    ours = {(path.name, name) for path in files for name in list_imports(path) if name.startswith("mergemill.")}
    rooms = {(name, module.split(".")[2]) for name, module in ours}
    assert {(name, other) for name, other in rooms if other not in MAY_IMPORT[room] | {room}} == set()


def test_no_modules_import_each_other() -> None:
    """Imports in functions count: such a cycle is hidden, and is one."""
    graph = {name_module(path): set(list_modules(path)) - {name_module(path)} for path in FILES}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def name_module(path: Path) -> str:
    """Return the full name of the module of a file."""
    return ".".join(["mergemill", "engine", *path.relative_to(ENGINE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_module(path) for path in FILES}


def list_modules(path: Path) -> Iterator[str]:
    """Yield the modules of the engine that a file imports anywhere in it: themselves, or a name from them."""
    for name in list_imports(path):
        if found := {name, name.rpartition(".")[0]} & MODULES:
            yield max(found, key=len)


def test_every_file_of_the_engine_is_in_a_room() -> None:
    assert {find_room(path) for path in FILES} == {*MAY_IMPORT, "__init__"}


def test_imports_point_down_the_folders_of_the_room_of_runs() -> None:
    level = {name: number for number, name in enumerate(INSIDE_RUNS)}
    found = {
        (path.relative_to(ENGINE).as_posix(), name)
        for path in FILES
        if find_room(path) == "runs"
        for name in list_imports(path)
        if name.startswith("mergemill.engine.runs.")
    }
    up = {
        (path, name)
        for path, name in found
        if level[find_folder(path.split("/")[1])] < level[find_folder(name.split(".")[3])]
    }
    assert {find_folder(path.split("/")[1]) for path, _ in found} == set(INSIDE_RUNS)
    assert up == set()


def find_folder(part: str) -> str:
    """Return the folder of the room `runs` that a part of a path or module names; empty for a file of the room."""
    return part if part in INSIDE_RUNS else ""


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_is_known_to_its_rooms_alone(library: str) -> None:
    rooms = {find_room(path) for path in FILES if library in {name.split(".")[0] for name in list_imports(path)}}
    assert rooms <= ONLY_IMPORTERS[library]


def test_dask_is_known_to_the_room_of_runs() -> None:
    """Or the tests above look for imports in the wrong place."""
    cluster = ENGINE / "runs" / "clusters" / "dask_crew.py"
    assert {"dask", "distributed"} <= {name.split(".")[0] for name in list_imports(cluster)}


def test_distributed_is_known_to_what_runs_a_cluster_alone() -> None:
    knowing = {path.name for path in FILES if any(name.split(".")[0] == "distributed" for name in list_imports(path))}
    assert knowing == {
        "cluster.py",
        "connect.py",
        "dask_crew.py",
        "factories.py",
        "plugin.py",
        "privacy.py",
        "results.py",
    }


def test_no_room_imports_what_the_engine_does_not_need() -> None:
    assert {(path.name, name) for path in FILES for name in list_imports(path) if is_unwanted(name)} == set()


def is_unwanted(name: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in NEVER)


def test_the_bar_alone_draws() -> None:
    drawing = {"rich", "IPython"}
    assert {path.name for path in FILES if drawing & {name.split(".")[0] for name in list_imports(path)}} == {
        "progress.py"
    }


def test_the_engine_never_prints() -> None:
    calls = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input")
    ]
    assert calls == []


MOST_PARAMETERS = 8
EXEMPT = {
    "merge_method": "declares a method, and its keywords are the fields of one, each with a default",
}
"""Functions that take more parameters than that, with the reason; so do merge methods, whose are a recipe's keys."""


def test_no_function_takes_more_than_eight_parameters() -> None:
    """The command line's take one for each option of a command."""
    functions = [
        (f"{path.relative_to(ENGINE).as_posix()}: {node.name}", node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    many = {name: node for name, node in functions if count_parameters(node) > MOST_PARAMETERS}
    free = {name for name, node in many.items() if any("merge_method(" in ast.unparse(d) for d in node.decorator_list)}
    assert len(functions) > 2000
    assert len(free) > 5
    assert {name.split(": ")[1] for name in many.keys() - free} == EXEMPT.keys()


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many parameters a function names; what takes any number counts as one."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


REACHING = {
    "AnyObjects",
    "Fetch",
    "S3Objects",
    "Workplace",
    "Workspace",
    "check_pin",
    "find_output",
    "find_store",
    "list_files",
    "open_checkpoint",
    "open_output",
    "open_stream",
    "pin_file",
    "read_header",
    "read_beginning",
    "read_into",
    "read_pieces",
    "read_remote",
    "read_small",
    "read_whole",
    "store_of",
}
"""What reaches storage, and so must be told how; without that it would go by the environment alone."""

LOCAL = {
    "storage/local.py",
    "conformance/bits.py",
    "conformance/mill.py",
    "runs/in_memory.py",
    "runs/describe.py",
    "plan/cost.py",
}
"""Files of the engine that reach none, or go by the environment since they have no recipe."""


def test_whatever_reaches_storage_is_told_how() -> None:
    """A call that forgets it would read from wherever the environment leads, and be seen by no type."""
    calls = [
        (path.relative_to(ENGINE).as_posix(), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and find_name(node.func) in REACHING
    ]
    untold = [f"{path}:{call.lineno}" for path, call in calls if path not in LOCAL and not is_told_storage(call)]
    assert len(calls) > 50
    assert untold == []


def find_name(called: ast.expr) -> str:
    """Return the name of a function that is called; those of `local` files, and methods, are others."""
    return called.id if isinstance(called, ast.Name) else ""


def is_told_storage(call: ast.Call) -> bool:
    """Whether an argument of a call is the value that says how storage is reached."""
    return any("storage" in ast.unparse(each).lower() for each in [*call.args, *call.keywords])


def test_the_public_face_is_exactly_this() -> None:
    assert mergemill.engine.__all__ == FACE
    assert [name for name in FACE if not hasattr(mergemill.engine, name)] == []
    assert [name for name in FACE if isinstance(getattr(mergemill.engine, name), ModuleType)] == NAMESPACES


def test_the_command_line_imports_nothing_of_the_engine_but_its_face() -> None:
    """In functions and for types too; of a namespace, what that says is in it."""
    found = {
        (path.name, name)
        for path in sorted(Path(mergemill.cli.__file__).parent.rglob("*.py"))
        for name in list_imports(path)
        if name.startswith("mergemill.engine")
    }
    assert len({file for file, _ in found}) > 10
    assert {(file, name) for file, name in found if not is_of_the_face(name)} == set()


def is_of_the_face(module: str) -> bool:
    name, *more = module.removeprefix("mergemill.engine").removeprefix(".").split(".")
    if not name:
        return True
    if name not in FACE or len(more) > 1:
        return False
    return not more or more[0] in find_public(getattr(mergemill.engine, name))


def find_public(namespace: ModuleType) -> Sequence[str]:
    """Return what a namespace of the face says is in it; all classes of the tree of errors are."""
    return getattr(namespace, "__all__", None) or [name for name in vars(namespace) if name[0].isupper()]


def test_what_is_not_of_the_face_is_known() -> None:
    """Or the test above finds everything right."""
    assert is_of_the_face("mergemill.engine.make_plan")
    assert is_of_the_face("mergemill.engine.methods.PerModel")
    assert is_of_the_face("mergemill.engine.errors.Cancelled")
    assert not is_of_the_face("mergemill.engine.methods.linear")
    assert not is_of_the_face("mergemill.engine.runs.running.run")
    assert not is_of_the_face("mergemill.engine.plan")


def test_tests_take_from_the_face_what_is_in_it() -> None:
    """A name that has moved is found here, and not by the slow tests alone."""
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    asked = {(path.name, name) for path in tests for name in list_imports(path) if FROM_FACE.fullmatch(name)}
    rooms = {path.stem for path in ENGINE.iterdir()}
    assert {(file, name) for file, name in asked if name.split(".")[2] not in {*FACE, *rooms}} == set()


HEAVY = {
    "torch",
    "vl_convert",
    "distributed",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "bokeh",
    "huggingface_hub",
    "s3fs",
}


def list_loaded(code: str) -> set[str]:
    """Return the libraries that a process has loaded after `code`."""
    code += "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_engine_imports_nothing_else() -> None:
    assert list_loaded("import mergemill.engine") & (HEAVY | {"dask", "numpy", "pydantic", "yaml"}) == set()


def test_the_whole_public_face_imports_no_heavy_library() -> None:
    loaded = list_loaded("from mergemill.engine import *")
    assert loaded >= {"dask", "numpy", "pydantic"}
    assert loaded & HEAVY == set()


MERGE = """
import sys
events = []
sys.addaudithook(lambda event, values: events.append(event) if event.startswith("socket.") else None)
from mergemill.cli.main import execute
assert execute(["merge", "recipe.yml", "out", "--quiet"]) == 0
print(*events)
print(*{"distributed", "torch"} & set(sys.modules))
"""


def test_a_small_merge_opens_no_socket_and_imports_neither_a_cluster_nor_torch(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", seed=1, layers=1)
    write_llama(tmp_path / "b", seed=2, layers=1)
    recipe = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}"
    (tmp_path / "recipe.yml").write_text(recipe)
    done = subprocess.run([sys.executable, "-c", MERGE], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert done.stdout == ("\n\n" if native.load() else "\ntorch\n")


def test_a_merge_of_local_models_leaves_the_network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "models" / "a", seed=1, layers=1)
    write_llama(tmp_path / "models" / "b", seed=2, layers=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("{merge_method: linear, models: [{model: models/a}, {model: models/b}], parameters: {weight: 1}}")
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guard(self: socket.socket, address: Any) -> None:
        # A datagram socket sends nothing when it connects: Dask asks the kernel that way for its own address.
        if (
            self.family != socket.AF_UNIX
            and self.type != socket.SOCK_DGRAM
            and address[0] not in ("127.0.0.1", "::1", "localhost")
        ):
            asked.append(address)
            raise OSError(f"the network is out of bounds: {address}")
        connect(self, address)

    def guard_name(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", "::1", "localhost", None, ""):
            asked.append(host)
            raise OSError(f"the network is out of bounds: {host}")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", guard)
    monkeypatch.setattr(socket, "getaddrinfo", guard_name)
    merge(str(recipe), tmp_path / "out", workers=0)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert asked == []


def test_every_class_has_a_name_of_its_own() -> None:
    nodes = (node for path in FILES for node in ast.walk(ast.parse(path.read_text())))
    named = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert len(named) > 250
    assert [name for name, count in named.items() if count > 1] == []

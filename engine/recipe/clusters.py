"""Cluster files: which Dask cluster a merge starts for itself, as a frozen value."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.access import OptionalClusterStorageOptions
from mergemill.engine.recipe.document import Form
from mergemill.engine.recipe.faults import Loc, describe, make_faults, make_predicate, make_sentence, shorten, suggest
from mergemill.engine.recipe.leaves import OptionalCount, OptionalText, check_count
from mergemill.engine.recipe.parsing import parse_value, read_text
from mergemill.engine.recipe.shapes import FrozenMap, Value
from mergemill.engine.storage.urls import parse_path

Kind = Literal["local", "ssh", "slurm", "pbs", "lsf", "sge", "kubernetes", "gateway", "cuda", "cloudprovider", "coiled"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Device = Literal["cpu", "cuda", "xpu", "mps", "auto"]
DEVICES: tuple[Device, ...] = get_args(Device)

FORM = Form("a cluster file", f"kind, one of {', '.join(KINDS)}, and workers")
_COUNTED = ("ssh", "cuda", "local")  # what is there says how many workers there are, where the file does not
_FIXED = ("ssh", "cuda")  # no worker comes or goes
_THREADS_ELSEWHERE = {  # whose options say it, in words of their own
    "gateway": "they are an option of your gateway, such as worker_cores",
    "cloudprovider": "they are an option of the provider's class, such as worker_cpu or worker_options",
}


def _check_given_count(value: object, *, least: int) -> object:
    if value is None:
        raise make_predicate("must be a whole number; nothing is written here")
    return check_count(value, least=least)


class Adaptive(Value):
    """Workers that come as there is work, and go."""

    called: ClassVar[str] = "an adaptive number of workers"

    minimum: Annotated[int, BeforeValidator(lambda value: _check_given_count(value, least=0))]
    """The fewest workers, also when there is nothing to do."""
    maximum: Annotated[int, BeforeValidator(lambda value: _check_given_count(value, least=1))]
    """The most workers."""

    @model_validator(mode="after")
    def _check_order(self) -> "Adaptive":
        if self.minimum > self.maximum:
            words = f"is {self.minimum}, more than the maximum of {self.maximum}"
            raise make_faults([(("minimum",), make_predicate(words))])
        return self


class Options(FrozenMap[Any]):
    """Arguments of a Dask cluster's class, frozen."""

    __slots__ = ()

    holds: ClassVar[Any] = Any

    def thaw(self) -> dict[str, Any]:
        """Return them as the plain values that the file says."""
        return {name: _thaw(value) for name, value in self.items()}


def _freeze(value: object) -> Any:
    if isinstance(value, Mapping):
        return Options({str(name): _freeze(item) for name, item in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _thaw(value: object) -> Any:
    if isinstance(value, Options):
        return value.thaw()
    return list(map(_thaw, value)) if isinstance(value, tuple) else value


def _check_options(value: object) -> object:
    return _freeze(value) if isinstance(value, Mapping) else value


def _check_kind(value: object) -> object:
    if not isinstance(value, str) or value not in KINDS:
        hint = f"; {suggest(value, KINDS)}" if isinstance(value, str) else f"; known here: {', '.join(KINDS)}"
        raise make_predicate(f"must be a kind of cluster, not {describe(value)}{hint}")
    return value


def _check_device(value: object) -> object:
    if not isinstance(value, str) or value not in DEVICES:
        hint = f"; {suggest(value, DEVICES)}" if isinstance(value, str) else f"; known here: {', '.join(DEVICES)}"
        raise make_predicate(f"must be a kind of device, not {describe(value)}{hint}")
    return value


def _check_workers(value: object) -> object:
    """Return a number, or what `Adaptive` is to be made of."""
    if value is None or isinstance(value, Mapping | Adaptive):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise make_predicate(f"must be a number or {{minimum: …, maximum: …}}, not {describe(value)}")
    return check_count(value, least=1)


def _read_workers(value: object) -> object:
    checked = _check_workers(value)
    return Adaptive.model_validate(checked) if isinstance(checked, Mapping) else checked


def _check_lines(value: object) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(line, str) and line.strip() for line in value):
        raise make_predicate(f"must be a list of texts, not {describe(value)}")
    return tuple(value)


Lines = Annotated[tuple[str, ...], BeforeValidator(_check_lines)]


class DriverPlace(Value):
    """What a driver is given that `mergemill submit` runs inside the cluster."""

    called: ClassVar[str] = "a driver's place"

    memory: OptionalText = None
    """Asked for, such as 4GiB; by default 4 GiB."""
    cpus: OptionalCount = None
    """Asked for; by default one."""
    walltime: OptionalText = None
    """Of its job, in kind slurm; by default that of the options."""
    directives: Lines = ()
    """Further options of sbatch, in kind slurm, such as --qos=low."""
    prologue: Lines = ()
    """Lines of shell before the merge, in kind slurm, such as module load python."""
    secrets: Lines = ()
    """Names of secrets whose keys are variables of all pods, in kind kubernetes."""


def _read_driver(value: object) -> object:
    return DriverPlace.model_validate(value) if isinstance(value, Mapping) else value


class ClusterFile(Value):
    """A Dask cluster that a merge starts for itself, and stops."""

    called: ClassVar[str] = "a cluster file"

    kind: Annotated[Kind, BeforeValidator(_check_kind)]
    """What starts the workers."""
    workers: Annotated[int | Adaptive | None, BeforeValidator(_read_workers)] = None
    """How many: a number, or {minimum, maximum}."""
    threads: OptionalCount = None
    """Threads of each worker; by default one."""
    memory: OptionalText = None
    """Promised to each worker, such as 4GiB; `--memory` is stronger."""
    device: Annotated[Device | None, BeforeValidator(_check_device)] = None
    """What each worker merges on; `--device` is stronger."""
    storage_options: OptionalClusterStorageOptions = None
    """How storage is reached, by scheme, without secrets; a recipe's are stronger."""
    driver: Annotated[DriverPlace, BeforeValidator(_read_driver)] = DriverPlace()
    """Where `mergemill submit` runs the driver."""
    options: Annotated[Options, BeforeValidator(_check_options)] = Options()
    """Arguments of the cluster's class, as they are."""
    name: Annotated[str, Field(exclude=True, repr=False)] = ""
    """The name that messages give the file."""

    @property
    def storage(self) -> dict[str, dict[str, Any]]:
        """The storage options as plain values."""
        return {scheme: dict(options) for scheme, options in (self.storage_options or {}).items()}

    @property
    def count(self) -> int:
        """The most workers; 0 where only the cluster knows."""
        return self.workers.maximum if isinstance(self.workers, Adaptive) else self.workers or 0

    @model_validator(mode="after")
    def _check_whole(self) -> "ClusterFile":
        faults: list[tuple[Loc, PydanticCustomError]] = []
        if self.workers is None and self.kind not in _COUNTED:
            faults.append(((), make_sentence(f"a cluster file of kind {self.kind} needs the key 'workers'")))
        if self.workers is not None and self.kind == "ssh":
            words = "has no place in kind ssh: there is a worker for each of options.hosts after the first"
            faults.append((("workers",), make_predicate(words)))
        if isinstance(self.workers, Adaptive) and self.kind in _FIXED:
            faults.append((("workers",), make_predicate(f"must be a number in kind {self.kind}: none come or go")))
        if self.threads is not None and (words := _THREADS_ELSEWHERE.get(self.kind, "")):
            faults.append((("threads",), make_predicate(f"has no place in kind {self.kind}: {words}")))
        if self.kind == "cloudprovider" and not _names_class(self.options.get("provider")):
            words = "needs the option 'provider' in kind cloudprovider, a class such as aws.FargateCluster"
            faults.append((("options",), make_predicate(words)))
        if faults:
            raise make_faults(faults)
        return self


def _names_class(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else []
    return len(parts) == 2 and all(part.isidentifier() for part in parts)


def load_cluster(name: str | Path) -> ClusterFile:
    """Return the cluster of a file, or of one that is built in; `RecipeError` where it is not valid.

    name: a path that ends in ``.yml`` or ``.yaml``, or the name of a file in ``configs/clusters``.
    """
    if Path(name).suffix in (".yml", ".yaml"):
        path = parse_path(name, RecipeError, what="a cluster file")
        return parse_cluster(read_text(path), name=str(path))
    known = list_clusters()
    if str(name) not in known:
        raise RecipeError(f"{shorten(name)}: no cluster is called so; {suggest(str(name), known)}; or a file, ….yml")
    return parse_cluster(_clusters().joinpath(f"{name}.yml").read_text("utf-8"), name=f"{name}.yml")


def parse_cluster(text: str, *, name: str = "cluster.yml") -> ClusterFile:
    """Return the cluster that the YAML `text` says; `name` is what messages call it."""
    return parse_value(ClusterFile, FORM, text, name=name).model_copy(update={"name": name})


def list_clusters() -> list[str]:
    """Return the names of the cluster files that are built in."""
    return sorted(file.name.removesuffix(".yml") for file in _clusters().iterdir() if file.name.endswith(".yml"))


def _clusters() -> Any:
    return resources.files("mergemill.configs").joinpath("clusters")

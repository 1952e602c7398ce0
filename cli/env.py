"""``mergemill env``: what is installed here, for a report of a fault."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergemill.cli import console
from mergemill.cli.options import Json


def env(json: Json = False) -> None:
    """Show what is installed: for a report of a fault.

    Example: mergemill env
    """
    from mergemill.engine import describe_environment

    found = describe_environment()
    if json:
        console.say_json(found)
        return
    console.say_facts(list(_facts(found)))


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if not isinstance(value, Mapping):
            yield name, "not installed" if value is None else str(value)
    for extra, packages in found["extras"].items():
        yield f"[{extra}]", ", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items())
    yield "devices", ", ".join(f"{count} {kind}" if kind != "cpu" else kind for kind, count in found["devices"].items())
    for name, place in found["caches"].items():
        yield "cache", f"{place} ({name})"

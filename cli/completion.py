"""What a shell completes: names of methods, devices and clusters, and recipes among the files.

Where nothing of ours begins so, the shell completes files, as it does by itself. Nothing here reads what a user wrote:
an error would come up in somebody's prompt.
"""

from pathlib import Path

SUFFIXES = (".yml", ".yaml")


def complete_recipe(incomplete: str) -> list[str]:
    """Return the YAML files that begin so."""
    folder, _, beginning = incomplete.rpartition("/")
    above = f"{folder}/" if "/" in incomplete else ""
    place = Path(above or ".")
    names = sorted(path.name for path in place.iterdir() if path.suffix in SUFFIXES) if place.is_dir() else []
    return [f"{above}{name}" for name in names if name.startswith(beginning)]


def complete_cluster(incomplete: str) -> list[str]:
    """Return the built-in clusters that begin so, and files as recipes are."""
    from mergemill.engine import list_clusters

    return [name for name in list_clusters() if name.startswith(incomplete)] + complete_recipe(incomplete)


def complete_device(incomplete: str) -> list[str]:
    """Return the devices that begin so."""
    from mergemill.engine import values

    return [name for name in values.DEVICES if name.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Return the merge methods that begin so."""
    from mergemill.engine.methods import find_all_methods, open_methods

    return [name for name in find_all_methods(open_methods(())) if name.startswith(incomplete)]


def complete_around(incomplete: str) -> list[str]:
    """Return the merge methods, and what goes around one, that begin so."""
    from mergemill.engine.methods import find_coefficients, find_steps

    around = [name for name in (*find_coefficients(), *find_steps()) if name.startswith(incomplete)]
    return complete_method(incomplete) + around


def complete_example(incomplete: str) -> list[str]:
    """Return the examples of `mergemill demo` that begin so."""
    from mergemill.cli.demo import list_examples

    return [name for name in list_examples() if name.startswith(incomplete)]

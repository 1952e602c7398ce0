"""Build the site of the documentation: ``python deploy/docs/build.py SITE``, strictly: a broken link ends it.

The pages are those of the folder, which stay where they speak of something, and a page of the package's functions made
of their docstrings. A link to a page stays one; a link to any other file leads to the repository. MkDocs with the theme
Material and mkdocstrings, and not Sphinx (2026-11-30): pages and docstrings are Markdown already, and stay readable
where they lie; docstrings are read without importing anything. Material ends in May 2027, and its authors' Zensical
reads the same configuration: that is where this goes then.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "configs/README.md",
    "deploy/README.md",
    "engine/README.md",
    "engine/methods/README.md",
    "engine/methods/guide.md",
    "tests/bench/README.md",
)
TITLES = ("Start", "Recipes", "Deployment", "How it is built", "Methods of your own", "Which method when", "Figures")
API = {
    "Merging": ("plan.make.make_plan", "runs.running.run", "runs.merge.merge", "runs.verify.verify"),
    "In memory": ("runs.in_memory.merge_state_dicts", "runs.in_memory.merge_tensors"),
    "Options": ("runs.options.RunOptions", "runs.worker.options.WorkerOptions"),
    "Looking": ("runs.inspect.inspect", "runs.diff.diff", "runs.status.status", "runs.attach.attach"),
    "Events and errors": ("runs.events", "errors"),
    "Methods": ("methods.contract.merge_method",),
}
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Build the site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = write_sources(Path(place), asked.site.absolute())
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
        done = subprocess.run(command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    raise SystemExit(done.returncode)


def write_sources(folder: Path, site: Path) -> Path:
    """Write pages and configuration below a folder; returns the configuration's path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    repository = project["urls"]["Source"]
    for name in PAGES:
        page = folder / "pages" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(lead_links((ROOT / name).read_text("utf-8"), name, repository), "utf-8")
    (folder / "pages" / "api.md").write_text(write_api(), "utf-8")
    package = folder / "source" / "mergemill"  # as it is installed
    package.mkdir(parents=True)
    for name, place in {"__init__.py": "cli/face/__init__.py", "engine": "engine"}.items():
        (package / name).symlink_to(ROOT / place)
    config = {
        "site_name": project["name"],
        "site_description": project["description"],
        "repo_url": repository,
        "docs_dir": "pages",
        "site_dir": str(site),
        "theme": {"name": "material", "font": False, "features": ["navigation.sections", "toc.follow"]},
        "plugins": [
            "search",
            {
                "mkdocstrings": {
                    "handlers": {
                        "python": {
                            "paths": [str(package.parent)],
                            "options": {
                                "show_root_heading": True,
                                "show_source": False,
                                "members_order": "source",
                                "heading_level": 3,
                            },
                        }
                    }
                }
            },
        ],
        "markdown_extensions": ["tables", "fenced_code", {"toc": {"permalink": True}}],
        "validation": {"links": {"anchors": "warn", "not_found": "warn", "unrecognized_links": "warn"}},
        "nav": [{title: name} for title, name in zip((*TITLES, "Functions"), (*PAGES, "api.md"), strict=True)],
    }
    path = folder / "mkdocs.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return path


def lead_links(text: str, page: str, repository: str) -> str:
    """Return a page whose links to what is no page lead to the repository."""

    def lead(found: re.Match[str]) -> str:
        target = os.path.normpath(Path(page).parent / found[1])
        if target in PAGES:
            return found[0]
        return f"]({repository}/blob/main/{target}{found[2] or ''})"

    return _LINK.sub(lead, text)


def write_api() -> str:
    """Return the page of the functions, of which mkdocstrings puts in what their docstrings say."""
    sections = (
        f"## {title}\n\n" + "\n".join(f"::: mergemill.engine.{name}\n" for name in names)
        for title, names in API.items()
    )
    return "# Functions\n\nWhat `import mergemill` gives, by its docstrings.\n\n" + "\n".join(sections)


if __name__ == "__main__":
    main()

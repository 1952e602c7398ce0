"""The site of the documentation is built strictly: every page, every link, every function's docstring."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from deployments import DEPLOY, need_module

ROOT = DEPLOY.parent
SCRIPT = DEPLOY / "docs" / "build.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_docs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_is_whole(tmp_path: Path, script: ModuleType) -> None:
    need_module("mkdocs", "mkdocs-material")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "site"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [tmp_path / "site" / Path(name.replace("README.md", "index.md")).with_suffix("") for name in script.PAGES]
    assert [
        page for page in pages if not (page.with_suffix(".html").is_file() or (page / "index.html").is_file())
    ] == []
    functions = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    names = [name for group in script.API.values() for name in group]
    assert [name for name in names if f'id="mergemill.engine.{name}"' not in functions] == []
    assert re.findall(r'(?:src|href)="(https?://[^"]*\.(?:js|css|woff2?))"', functions) == []  # nothing is fetched


def test_a_broken_link_ends_it(tmp_path: Path, script: ModuleType) -> None:
    need_module("mkdocs", "mkdocs-material")
    config = script.write_sources(tmp_path, tmp_path / "site")
    said = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(said | {"nav": ["api.md"], "plugins": []}))  # one page is enough
    shutil.rmtree(tmp_path / "pages")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "api.md").write_text("# Functions\n\n[gone](#no-such-title)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-title" in done.stdout + done.stderr


def test_links_to_what_is_no_page_lead_to_the_repository(script: ModuleType) -> None:
    text = "[a](../engine/README.md#words) [b](slurm/run.sh) [c](#here) [d](https://e)"
    led = "[a](../engine/README.md#words) [b](https://r/blob/main/deploy/slurm/run.sh) [c](#here) [d](https://e)"
    assert script.lead_links(text, "deploy/README.md", "https://r") == led


def test_every_page_of_the_folder_is_in_it(script: ModuleType) -> None:
    from test_pages import PAGES

    assert set(PAGES) <= set(script.PAGES)

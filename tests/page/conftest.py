"""A root with small models, and the page over it: as an application, and as a process."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import write_llama

from mergemill.cli.page.app import GuardedApp, make_app
from mergemill.cli.page.gate import Address
from mergemill.cli.page.settings import Setup

TOKEN = "a-token-of-the-tests"
ADDRESS = Address("127.0.0.1", 8797)

# A merge that takes its time: a moment for each tensor, without work.
PATIENT = '''\
"""Patient: the first model, slowly.

Source: a test.
"""

import time

from mergemill.engine.methods import merge_method
from mergemill.engine.tensors.lazy import Tensor


@merge_method(reads="element")
def patient(models: list[Tensor]) -> Tensor:
    time.sleep(0.2)
    return models[0]
'''

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/base`, `a` and `b`, and one outside of it with a model."""
    folder = tmp_path_factory.mktemp("page") / "root"
    base = write_llama(folder / "models" / "base", seed=0, layers=2)
    for seed, name in enumerate("ab", start=1):
        write_llama(folder / "models" / name, seed=seed, layers=2, near=base)
    write_llama(folder.parent / "outside", seed=3, layers=1)
    (folder / "patient.py").write_text(PATIENT)
    return folder


@pytest.fixture
def app(root: Path, monkeypatch: pytest.MonkeyPatch) -> GuardedApp:
    """The page, in this process."""
    monkeypatch.chdir(root)
    return make_app(Setup(root), ADDRESS, TOKEN)


@pytest.fixture
def ask(app: GuardedApp) -> Ask:
    """Make a request as the page's own scripts do, but for what is said otherwise; None leaves a header out."""

    def send(method: str, path: str, headers: dict[str, str | None] | None = None, **more: Any) -> httpx.Response:
        given = {"authorization": f"Bearer {TOKEN}", "origin": "http://127.0.0.1:8797", **(headers or {})}
        kept = {name: value for name, value in given.items() if value is not None}

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8797") as client:
                return await client.request(method, path, headers=kept, **more)

        return asyncio.run(run())

    return send


@pytest.fixture(scope="module")
def start_page() -> Iterator[Callable[..., tuple["subprocess.Popen[str]", str]]]:
    """Start the page as a process; returns it and its address, the token with it."""
    started: list[subprocess.Popen[str]] = []

    def start(root: Path, *arguments: str) -> tuple["subprocess.Popen[str]", str]:
        words = [sys.executable, "-m", "mergemill", "ui", str(root), *(arguments or ("--port", "0"))]
        environ = {name: value for name, value in os.environ.items() if name != "MERGEMILL_UI_TOKEN"}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environ)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()

"""``mergemill env``: what is told of an installation."""

import json
import platform
from collections.abc import Callable
from importlib.metadata import version

import pytest

from mergemill.engine import describe_environment
from mergemill.engine.runs import environment
from mergemill.engine.tensors import native

Run = Callable[..., tuple[int, str, str]]


def test_env_tells_versions_extras_devices_and_caches(mergemill: Run) -> None:
    code, out, err = mergemill("env")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert facts["mergemill"] == version("mergemill")
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == version("torch")
    assert facts["distributed"] == version("distributed")
    assert facts["native"].startswith("on" if native.load() else "off: ")
    assert facts["devices"].startswith("cpu")
    assert facts["cache"].endswith("mergemill (sources)")
    assert f"boto3 {version('boto3')}" in facts["[s3]"]
    assert "[test]" not in facts


def test_env_is_json_for_programs(mergemill: Run) -> None:
    code, out, _ = mergemill("env", "--json")
    assert code == 0
    assert json.loads(out) == describe_environment()


def test_loops_that_are_off_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEMILL_NATIVE", "0")
    assert environment.describe_native() == "off: MERGEMILL_NATIVE=0"
    monkeypatch.delenv("MERGEMILL_NATIVE")
    monkeypatch.setattr(native, "load", lambda: None)
    assert environment.describe_native() == "off: not built; install a C compiler, and mergemill again"


def test_a_package_that_is_not_here_is_told_as_such(mergemill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "requires", lambda name: ["no-such-package>=1; extra == 'far'"])
    _, out, _ = mergemill("env")
    assert "[far]" in out
    assert "no-such-package not installed" in out

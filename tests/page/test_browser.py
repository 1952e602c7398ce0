"""The page in a real browser, Debian's Chromium: from an empty page to a loaded result, and what goes wrong there."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import read_tensors

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or ""
SERIOUS = ("serious", "critical")
if not CHROMIUM:
    pytest.skip("no chromium is here", allow_module_level=True)

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def place(root: Path, start_page: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root that the tests here share, and the address of its page."""
    folder = tmp_path_factory.mktemp("browser") / "root"
    shutil.copytree(root, folder, symlinks=True, ignore=shutil.ignore_patterns(".*", "link*"))
    return folder, start_page(folder, "--port", "0", "--methods", str(folder / "patient.py"))[1]


@pytest.fixture
def page(place: tuple[Path, str], browser: Any) -> Iterator[Any]:
    """A tab of a browser that knows nothing yet; an error in it fails the test."""
    tab = open_tab(browser, place[1])
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    tab.context.close()
    assert errors == []


def open_tab(browser: Any, address: str, **more: Any) -> Any:
    """Return a tab of another browser: it shares nothing with others."""
    tab = browser.new_context(**more).new_page()
    tab.set_default_timeout(60_000)  # a busy machine is no fault
    tab.goto(address)
    tab.wait_for_selector("#shelf li button")
    return tab


def find_serious(tab: Any) -> list[str]:
    """Return what axe-core finds of weight."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in SERIOUS]


def test_from_an_empty_page_to_a_loaded_result(page: Any, place: tuple[Path, str]) -> None:
    assert find_serious(page) == []
    assert page.evaluate("location.hash") == "#build"  # the token is gone from the address
    for name in "ab":
        page.get_by_role("button", name=f"Add models/{name}", exact=True).click()
    page.get_by_role("button", name="Take models/base as the base").click()
    page.locator("#f-base_model").and_(page.locator("[value='models/base']")).wait_for()
    assert page.get_by_label("Method", exact=True).input_value() == "task_arithmetic", "linear has no base"
    page.get_by_label("Method", exact=True).select_option("ties")
    page.get_by_label("density (from 0 to 1)").first.fill("0.5")
    page.keyboard.press("Tab")
    wait_for_text(page, "density: 0.5")
    page.get_by_text("can be merged", exact=True).wait_for()
    weight = page.get_by_label("weight", exact=True).first
    weight.press("End")
    page.keyboard.type("25")  # and has not left the field when the text below is looked at
    page.locator("#seed").evaluate("(seed) => { seed.value = '3'; seed.dispatchEvent(new Event('input')); }")
    page.get_by_text("can be merged", exact=True).wait_for()
    assert weight.input_value() == "0.525"
    page.keyboard.press("Tab")
    wait_for_text(page, "weight: 0.525")
    page.locator("#method-help summary").click()
    assert "Yadav et al." in page.locator("#method-help").inner_text()
    assert find_serious(page) == []

    text = page.locator("#yaml").input_value()
    page.locator("#yaml").fill(text.replace("density", "densty"))
    fault = page.locator(".fault").first
    fault.wait_for()
    assert "did you mean 'density'?" in fault.inner_text()
    assert page.locator("#gutter .bad").inner_text() == "5"
    assert page.get_by_role("button", name="Merge", exact=True).is_disabled()
    assert find_serious(page) == []
    page.locator("#yaml").fill(text)

    page.locator("#out").fill("made/of-ties")
    page.get_by_role("button", name="Merge", exact=True).click()
    page.get_by_role("heading", name="Use it").wait_for()
    assert page.get_by_role("heading", name="Merge into made/of-ties").is_visible()
    out = place[0] / "made" / "of-ties"
    assert read_tensors(out).keys() == read_tensors(place[0] / "models" / "base").keys()
    assert re.search(r'name = ".*/made/of-ties"', page.locator("#w-came").inner_text())
    assert find_serious(page) == []
    page.get_by_role("link", name="Runs").click()
    page.get_by_role("link", name="made/of-ties").wait_for()
    assert find_serious(page) == []


def wait_for_text(page: Any, words: str) -> None:
    end_s = time.monotonic() + 60
    while words not in page.locator("#yaml").input_value():
        assert time.monotonic() < end_s, page.locator("#yaml").input_value()
        time.sleep(0.05)


def test_a_run_is_seen_by_two_browsers_outlives_a_reload_is_cancelled_and_resumed(
    page: Any, browser: Any, place: tuple[Path, str]
) -> None:
    recipe = "merge_method: patient\nmodels:\n  - model: models/a\n"
    page.locator("#yaml").fill(recipe)
    page.locator("#out").fill("slow")
    page.locator("#shard_size").fill("tensor")
    page.locator("#threads").fill("1")
    if page.locator("#report").is_enabled():
        page.locator("#report").uncheck()
    page.get_by_text("can be merged", exact=True).wait_for()
    page.get_by_role("button", name="Merge", exact=True).click()
    page.locator("#w-state").get_by_text(re.compile("running")).wait_for()
    page.reload()
    page.locator("#w-state").get_by_text(re.compile("running")).wait_for()

    other = open_tab(browser, place[1])
    other.get_by_role("link", name="Runs").click()
    other.get_by_role("link", name="slow").click()
    other.get_by_role("button", name="Cancel").click()
    for tab in (page, other):
        tab.get_by_role("button", name="Resume").wait_for()
    assert "stopped" in page.locator("#w-state").inner_text()
    assert not (place[0] / "slow" / "model.safetensors.index.json").exists()
    page.get_by_role("button", name="Resume").click()
    for tab in (page, other):
        tab.get_by_role("heading", name="Use it").wait_for()
    assert (
        "were done before" in page.locator("#w-facts").inner_text()
        or "resuming:" in page.locator("#w-log").inner_text()
    )
    other.context.close()
    written, asked = read_tensors(place[0] / "slow"), read_tensors(place[0] / "models" / "a")
    assert all((written[name] == asked[name]).all() for name in asked)


def test_the_keyboard_completes_methods_parameters_and_models(page: Any) -> None:
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id + location.hash") == "main#build"  # past the links
    yaml = page.locator("#yaml")
    yaml.focus()
    page.keyboard.type("merge_method: task")
    page.locator("#words li").first.wait_for()
    assert find_serious(page) == []
    page.keyboard.press("Enter")
    page.keyboard.type("\nbase_model: models/ba")
    page.keyboard.press("Enter")
    page.keyboard.type("\nmodels:\n- model: models/a")
    page.keyboard.press("Escape")
    page.keyboard.type("\n  parameters: {we")
    page.keyboard.press("Enter")
    page.keyboard.type("0.5}")
    assert yaml.input_value() == (
        "merge_method: task_arithmetic\nbase_model: models/base\nmodels:\n- model: models/a\n"
        "  parameters: {weight: 0.5}"
    )
    page.get_by_text("can be merged", exact=True).wait_for()


def test_nothing_is_wider_than_the_window_light_and_dark(page: Any) -> None:
    page.locator("#yaml").fill("merge_method: linear\nmodels: [{model: models/a, parameters: {wieght: 1}}]\n")
    page.locator(".fault").first.wait_for()
    for width, scheme in ((400, "dark"), (1280, "dark"), (320, "light")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert find_serious(page) == []
    page.emulate_media(color_scheme="dark")
    assert find_serious(page) == []


def test_without_the_token_there_is_a_door(browser: Any, place: tuple[Path, str]) -> None:
    address, _, token = place[1].partition("#token=")
    tab = browser.new_context().new_page()
    tab.goto(address)
    tab.locator("#token").fill(token)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#shelf li button")
    asked = json.loads(tab.evaluate("fetch('/api/runs').then((answer) => answer.text())"))
    assert asked["message"].startswith("the token is missing")
    tab.context.close()

"""The HTML report in headless Chromium: opened from disk, filtered, a failure found by keyboard, at three widths."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from verdict_streams import lines, many, result, write

from moe_conformance.judging.verdict import Verdict
from moe_conformance.reporting.page import MOST_BYTES, html
from moe_conformance.reporting.runs import columns, gather
from moe_conformance.reporting.stream import compare
from moe_conformance.reporting.tables import Cell, cells

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

CASES = (
    "layer-tiny-padded-hidden",
    "layer-tiny-latent-padded-hidden",
    "layer-tiny-shared-padded-hidden",
    "layer-one-token-padded-hidden",
)
EVIL = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script> got 1, want 2"
# Longest task of the page's script, in milliseconds, that nobody takes for a frozen window.
FROZEN = 1000
WATCH = """
window.long = [0];
new PerformanceObserver((list) => window.long.push(...list.getEntries().map((entry) => entry.duration)))
  .observe({ type: "longtask", buffered: true });
"""


def before_and_after(folder: Path) -> tuple[Path, Path]:
    """Two releases of an engine, in which cases got worse and better; a second engine is in the later run alone."""
    route = "route-gemma4-e128-k8-t7-bf16-distinct"
    old = [
        result(CASES[0], Verdict.PASS),
        result(CASES[1], Verdict.FAIL, "row 3: got 1, want 2"),
        result(CASES[2], Verdict.PASS),
        result(CASES[3], Verdict.PASS),
        result(route, Verdict.UNSUPPORTED, "stage route is not offered"),
    ]
    new = [
        result(CASES[0], Verdict.FAIL, EVIL),
        result(CASES[1], Verdict.PASS),
        result(CASES[2], Verdict.KNOWN_FAILURE, "listed as never"),
        result(CASES[3], Verdict.UNSUPPORTED, "feature padded_hidden is not offered"),
        result(route, Verdict.CRASH, "the engine's process died: SIGSEGV"),
        result(CASES[0], Verdict.PASS, engine="other"),
    ]
    return (
        write(folder / "before", lines(old, {"mine": "0.9.0"})),
        write(folder / "after", lines(new, {"mine": "0.10.0", "other": "2.0"})),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return before_and_after(tmp_path_factory.mktemp("runs"))


def major(program: str) -> str:
    """Its version's first number: a driver drives browsers of its own only."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"(\d+)\.\d+", said)), "none")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    program = shutil.which("chromedriver")
    browsers = list(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    fitting = [browser for browser in browsers if program and major(browser) == major(program)]
    if not fitting:
        pytest.skip(
            f"got browsers {browsers} and driver {program}, want Chromium and a driver of its version: "
            "apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = fitting[0]
    # As root, which CI's containers are, Chromium has no sandbox; the page is ours.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(program))
    found.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    yield found
    found.quit()


class Browser:
    """The report in a window of this width."""

    def __init__(self, driver: Any, file: Path) -> None:
        self.driver, self.file = driver, file

    def open(self, state: str = "", width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        self.driver.get(f"{self.file.as_uri()}{f'#{state}' if state else ''}")
        self.until("document.querySelector('#app').getAttribute('aria-busy') === 'false'")

    def js(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def until(self, code: str) -> None:
        end = time.monotonic() + 20
        while not self.js(code):
            assert time.monotonic() < end, f"never true: {code}; log: {self.driver.get_log('browser')}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def choose(self, name: str, value: str) -> None:
        (field,) = self.driver.find_elements("css selector", f"form [name={name}]")
        field.send_keys(value) if name == "q" else Select(field).select_by_value(value)

    def results(self) -> list[str]:
        return self.js(
            "[...document.querySelectorAll('#results a')].map((link) => link.innerText.replaceAll('\\n', ' | '))"
        )


@pytest.fixture
def browser(driver: Any, folders: tuple[Path, Path], tmp_path: Path) -> Browser:
    (file := tmp_path / "report.html").write_text(html(gather(folders)), encoding="utf-8")
    return Browser(driver, file)


def test_it_opens_from_disk_without_a_word_of_complaint(browser: Browser) -> None:
    browser.driver.get_log("browser")
    browser.open()
    assert len(browser.results()) == 11
    assert browser.js("document.querySelector('#chips').innerText").split("\n") == [
        "✗ 3 of 8 MUST failed", "0 of 0 SHOULD broken", "1 known", "2 not judged", "0 absent",
    ]  # fmt: skip
    assert browser.driver.get_log("browser") == []


def test_its_table_has_the_numbers_of_the_terminals(browser: Browser, folders: tuple[Path, Path]) -> None:
    browser.open()
    shown = columns(gather(folders))
    heads = browser.js("[...document.querySelectorAll('#table thead th')].map((cell) => cell.textContent)")
    assert (
        heads == ["class", *(column.label for column in shown)] == ["class", "mine 0.9.0", "mine 0.10.0", "other 2.0"]
    )
    for name, row in cells({column.label: column.results for column in shown}).items():
        texts = browser.js(
            f"[...document.querySelectorAll('tr[data-group=\"{name}\"] td')].map((cell) => cell.innerText)"
        )
        for column, text in zip(shown, texts, strict=True):
            cell = row.get(column.label, Cell.empty())
            must, known = cell.text("must"), f"{cell.known.all} known"
            assert (must in text.split()) if must else ("/" not in text), (name, column.label, text)
            assert (known in text.split("\n")) is bool(cell.known.all)


def test_a_filter_is_kept_in_the_address_and_taken_from_it(browser: Browser) -> None:
    browser.open()
    browser.choose("verdict", "any failure")
    browser.until("document.querySelectorAll('#results a').length === 3")
    browser.choose("engine", "mine")
    browser.choose("q", "SIGSEGV")
    browser.until("document.querySelectorAll('#results a').length === 1")
    state = browser.js("location.hash.slice(1)")
    assert state == "verdict=any+failure&engine=mine&q=SIGSEGV"
    browser.open(state)
    (row,) = browser.results()
    assert row.startswith("✗ crash | mine 0.10.0 | route-gemma4")
    assert browser.js("document.forms[0].q.value + document.forms[0].verdict.value") == "SIGSEGVany failure"
    browser.js("document.querySelector('button[type=reset]').click()")
    browser.until("document.querySelectorAll('#results a').length === 11")


def test_a_class_opens_to_its_clauses_and_a_cell_filters(browser: Browser) -> None:
    browser.open()
    browser.js("document.querySelector('tr[data-group=\"shape-mismatch\"] button').click()")
    browser.until("document.querySelector('tr.clause th')?.textContent === 'layer.cut-before-add'")
    browser.js("document.querySelector('tr.clause a').click()")
    browser.until("document.querySelectorAll('#results a').length === 4")
    assert "clause=layer.cut-before-add" in browser.js("location.hash")


def test_a_failure_is_found_and_read_by_keyboard_alone(browser: Browser) -> None:
    browser.open()
    browser.press("/", *"SIGSEGV")
    browser.until("document.querySelectorAll('#results a').length === 1")
    browser.press(Keys.ENTER)
    browser.until("document.activeElement.closest('#results') !== null")
    browser.press("j", "k", Keys.ENTER)
    browser.until("document.querySelector('#case').open")
    text = browser.js("document.querySelector('#case').innerText")
    for part in (
        "route-gemma4-e128-k8-t7-bf16-distinct",
        "the engine's process died: SIGSEGV",
        "MUST: ",
        "tokens = 7",
        "moe-conformance run --engine mine --case route-gemma4-e128-k8-t7-bf16-distinct",
        "unsupported mine 0.9.0",
    ):
        assert part in text, text
    assert "open=route-gemma4" in browser.js("location.hash")
    browser.press(Keys.ESCAPE)
    browser.until("!document.querySelector('#case').open")
    assert "open=" not in browser.js("location.hash")
    assert browser.js("document.activeElement.closest('#results') !== null")


def test_the_open_case_links_the_threads_of_its_clause(browser: Browser) -> None:
    browser.open(f"open={CASES[0]}/output+is+right/mine+0.10.0")
    links = browser.js("[...document.querySelectorAll('#case a[rel]')].map((link) => link.href)")
    assert "https://github.com/vllm-project/vllm/issues/40794" in links


def test_a_failure_has_the_commands_that_rerun_it_and_write_a_report_of_it(driver: Any, tmp_path: Path) -> None:
    """With the run's seed, and the engine as it was asked for; what repro cannot write out has no such command."""
    made = [result(name, Verdict.FAIL, "got 1, want 2", "my pkg/a.py:E") for name in (CASES[0], "align-e60-k6")]
    made.append(result(CASES[1], Verdict.PASS, engine="my pkg/a.py:E"))
    folder = write(tmp_path / "run", lines(made, {"my pkg/a.py:E": "1"}, selection={"seed": 7}))
    (file := tmp_path / "report.html").write_text(html(gather([folder])), encoding="utf-8")
    browser = Browser(driver, file)
    found = {}
    for name in (CASES[0], CASES[1], "align-e60-k6"):
        browser.open()
        browser.js(f"[...document.querySelectorAll('#results a')].find((a) => a.innerText.includes('{name}')).click()")
        browser.until("document.querySelector('#case').open")
        found[name] = browser.js("[...document.querySelectorAll('#case .command pre')].map((text) => text.innerText)")
    asked = "--engine 'my pkg/a.py:E'"
    rerun = {name: f"moe-conformance run {asked} --case {name} --seed 7" for name in found}
    assert found == {
        CASES[0]: [rerun[CASES[0]], f"moe-conformance repro {CASES[0]} {asked} --seed 7"],
        CASES[1]: [rerun[CASES[1]]],
        "align-e60-k6": [rerun["align-e60-k6"]],
    }


def test_markup_in_a_message_is_text(browser: Browser) -> None:
    browser.open(f"open={CASES[0]}/output+is+right/mine+0.10.0")
    assert EVIL in browser.js("document.querySelector('#case pre').textContent")
    assert browser.js("document.title") != "owned" and browser.js("document.images.length") == 0


def test_the_difference_of_two_runs_is_that_of_diff(browser: Browser, folders: tuple[Path, Path]) -> None:
    browser.open("from=before&to=after")
    want = [
        f"{'▼ worse:' if change.is_worse else '▲'} {change.before or 'not run'} → {change.after or 'not run'}".replace(
            "_", " "
        )
        for change in compare(*folders)
    ]
    got = [row.partition(" | ")[0] for row in browser.results()]
    assert sorted(got) == sorted(want) and len(got) == 6
    assert browser.js("document.querySelector('#h-results').textContent") == "From before to after: 6 changed, 3 worse"


@pytest.mark.parametrize("width", [1440, 820, 390])
def test_nothing_is_wider_than_the_window(browser: Browser, width: int) -> None:
    for state in ("", f"open={CASES[0]}/output+is+right/mine+0.10.0"):
        browser.open(state, width)
        assert browser.js("document.documentElement.scrollWidth") <= width


def test_long_names_and_words_do_not_widen_a_phone(driver: Any, tmp_path: Path) -> None:
    long = [result(CASES[0], verdict, "m" * 3000, "e" * 120, "k" * 200) for verdict in (Verdict.FAIL, Verdict.PASS)]
    runs = [
        write(tmp_path / name / version, lines(long, {"e" * 120: version}))
        for name, version in (("one", "v" * 80), ("two", "2.0"))
    ]
    (file := tmp_path / "report.html").write_text(html(gather(runs)), encoding="utf-8")
    for state in ("", f"open={CASES[0]}/{'k' * 200}/{'e' * 120}+2.0"):
        (browser := Browser(driver, file)).open(state, 390)
        assert browser.js("document.documentElement.scrollWidth") <= 390


def test_dark_and_light_follow_the_system_until_somebody_chooses(browser: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.open(scheme="dark")
    browser.js("localStorage.clear()")
    browser.open(scheme="dark")
    dark = browser.js(background)
    browser.open(scheme="light")
    light = browser.js(background)
    assert dark != light
    for want in (light, dark, light):  # light, dark, system
        browser.js("document.querySelector('#theme').click()")
        assert browser.js(background) == want


def test_every_mark_has_its_word(browser: Browser) -> None:
    """Colour is never alone: whoever sees none, or hears the page, misses nothing."""
    browser.open()
    said = browser.js("[...document.querySelectorAll('.badge')].map((each) => each.innerText)")
    assert {text.partition(" ")[2] for text in said} == {"fail", "crash", "pass", "known failure", "unsupported"}
    unnamed = "[...document.querySelectorAll('input, select')].filter((each) => !each.labels.length).length"
    assert browser.js(unnamed) == 0


def seconds(*arguments: str) -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.monotonic() - started


@pytest.mark.nightly
def test_a_hundred_thousand_results_are_quick_to_write_small_and_never_freeze(driver: Any, tmp_path: Path) -> None:
    many(tmp_path / "runs", 100_000)
    file = tmp_path / "r.html"
    command = ("-m", "moe_conformance.cli", "report", str(tmp_path / "runs"), "--html", str(file))
    assert seconds(*command) < 10 * min(seconds("-c", "import torch") for _ in range(3))
    assert file.stat().st_size <= MOST_BYTES
    browser = Browser(driver, file)
    browser.open()
    for state in ("engine=one", "class=routing-semantics&verdict=fail", "q=within+1e-7", "from=run-0&to=run-4", ""):
        browser.js(f"location.hash = '{state}'")
        time.sleep(0.5)
        browser.until("document.querySelectorAll('#results a').length === 100")
    assert browser.js("Math.max(...window.long)") < FROZEN

"""`moe-conformance report` on results that are cut off, doubled or somebody else's: said, and the rest is shown."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_cli import invoke
from verdict_streams import lines, result, write

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Verdict
from moe_conformance.reporting import page
from moe_conformance.reporting.page import badge, html
from moe_conformance.reporting.runs import columns, gather
from moe_conformance.reporting.threads import address

CASE, OTHER = "layer-tiny-padded-hidden", "layer-tiny-latent-padded-hidden"
WHOLE = [result(CASE, Verdict.PASS), result(OTHER, Verdict.FAIL, "got 1, want 2")]
TEXT = lines(WHOLE, {"mine": "1.0"})


def data_of(text: str) -> Any:
    """What the page's script unpacks."""
    (packed,) = re.findall(r'id="data">([^<]*)<', text)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT[:-1], "cut off: it has no footer"),
        ([*TEXT[:-2], TEXT[-2][:40]], "cut off: it has no footer"),
        ([*TEXT[:-2], TEXT[-2][:40]], "1 lines are no part of a verdict stream, the first is line 4: JSONDecodeError"),
        ([*TEXT[:-1], TEXT[-2], TEXT[-1]], "1 results are written twice; each is shown once"),
        ([*TEXT, *lines(WHOLE[:1], {})], "2 runs in one file, shown as one"),
        (TEXT[1:], "it has no header: which suite wrote it is not known"),
        (lines(WHOLE, {}, suite="9.9"), "written by suite 9.9, read by "),
        (lines(WHOLE, {}, protocol=3), "written by protocol 3, read by 2"),
        ([*TEXT[:2], *TEXT[3:]], "the footer counts 2 results, 1 are here"),
        ([*TEXT, '{"kind": "result", "verdict": "fine"}'], "1 lines are no part of a verdict stream"),
        ([*TEXT, TEXT[2].replace('"mine"', "7")], "the first is line 6: ValueError: got 7, want a string"),
        ([*TEXT, TEXT[2].replace("0.25", "NaN")], "the first is line 6: ValueError: seconds: got nan"),
        ([*TEXT, TEXT[-1].replace('"results": 2', '"results": Infinity')], "the first is line 6: OverflowError"),
        ([*TEXT, TEXT[2].replace("layer-tiny-padded-hidden", "no-such-case")], "1 cases are none of this suite"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said_and_the_rest_is_shown(tmp_path: Path, text: list[str], said: str) -> None:
    (run,) = gather([write(tmp_path / "run", text)])
    assert any(said in trouble for trouble in run.troubles), run.troubles
    shown = html([run])
    assert said.partition(":")[0] in shown
    data = data_of(shown)
    assert OTHER in [case["id"] for case in data["cases"]] or CASE in [case["id"] for case in data["cases"]]
    assert len(data["rows"]["case"]) == len(run.results) > 0


def test_a_whole_run_has_no_trouble(tmp_path: Path) -> None:
    (run,) = gather([write(tmp_path / "run", TEXT)])
    assert (run.troubles, run.results) == ([], WHOLE)
    assert 'class="trouble"' not in html([run])


def test_a_run_given_twice_is_shown_once_and_a_folder_of_runs_run_by_run(tmp_path: Path) -> None:
    for version in ("0.9.0", "0.10.0", "0.10.0rc1"):
        write(tmp_path / "all" / version, lines(WHOLE, {"mine": version}))
    copy = write(tmp_path / "copy", lines(WHOLE, {"mine": "0.9.0"}))
    runs = gather([tmp_path / "all", copy])
    assert [run.name for run in runs] == ["0.10.0", "0.10.0rc1", "0.9.0"]
    assert [run.troubles for run in runs if run.troubles] == [
        [f"given twice, also as {copy}/verdicts.jsonl; shown once"]
    ]
    assert [column.label for column in columns(runs)] == ["mine 0.9.0", "mine 0.10.0rc1", "mine 0.10.0"]


def test_two_runs_of_one_version_are_told_apart(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", TEXT), write(tmp_path / "b", lines(WHOLE[:1], {"mine": "1.0"}))
    assert [column.label for column in columns(gather([one, two]))] == ["mine 1.0 (a)", "mine 1.0 (b)"]


@pytest.mark.parametrize(
    ("name", "said"), [("none", "got nothing, want a folder"), ("empty", "without verdicts.jsonl")]
)
def test_where_there_is_nothing_to_show_is_a_usage_error(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    code, output = invoke("report", str(tmp_path / name), "--html", str(tmp_path / "r.html"))
    assert (code, said in " ".join(output.split()), (tmp_path / "r.html").exists()) == (2, True, False)


TWO = {"good": Verdict.PASS, "bad": Verdict.FAIL}


def test_a_file_that_is_no_stream_is_a_usage_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_bytes(b"\xff\x00 nothing")
    with pytest.raises(UsageError, match=r"got no result .*no header.*1 lines are no part"):
        gather([tmp_path])


def test_the_command_writes_page_and_badge_and_says_what_is_wrong(tmp_path: Path) -> None:
    run = write(tmp_path / "run", TEXT[:-1])
    files = [tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.svg"]
    asked = zip(("--html", "--markdown", "--badge"), map(str, files), strict=True)
    code, output = invoke("report", str(run), *(word for pair in asked for word in pair))
    assert code == 0 and output.startswith("run: cut off") and all(f"{file}: 2 results" in output for file in files)
    assert invoke("report", str(run))[0] == 2
    assert invoke("report", str(run), "--html", str(tmp_path / "no" / "r.html"))[0] == 2


def test_the_tables_of_several_runs_stand_beside_each_other(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, lines([result(CASE, verdict)], {})) for name, verdict in TWO.items()]
    assert invoke("report", *map(str, runs), "--markdown", str(tmp_path / "r.md"))[0] == 0
    head, _, row = (tmp_path / "r.md").read_text().splitlines()[:3]
    assert head.split(" | ")[1:] == ["mine (good)", "mine (bad) |"]
    assert row.split(" | ")[1:] == ["0/1", "1/1 |"]


def test_a_message_with_markup_is_data_and_a_long_one_is_folded(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \ud800"
    results = [result(CASE, Verdict.FAIL, evil, "<b>e</b>"), result(OTHER, Verdict.FAIL, "x" * 19_000)]
    runs = gather([write(tmp_path / "<i>run", lines(results, {"<b>e</b>": "<u>1</u>"}, platform="<s>"))])
    text = html(runs)
    assert text.count("<script") == text.count("</script>") == 2
    assert not any(part in text for part in ("<img", "<b>e", "<u>1", "<i>run", "<s>", "alert(1)</"))
    messages = data_of(text)["messages"]
    assert messages[0] == evil.replace("\ud800", "\\ud800")
    assert len(messages[1]) < 4100 and "\n... 15000 characters left out ...\n" in messages[1]


def test_messages_are_folded_further_until_the_page_is_small_enough(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 30_000)
    letters = random.Random(0)
    messages = ["".join(map(chr, letters.choices(range(33, 123), k=4000))) for _ in range(40)]
    results = [result(CASE, Verdict.FAIL, message, check=f"c{n}") for n, message in enumerate(messages)]
    text = html(gather([write(tmp_path / "run", lines(results, {}))]))
    assert max(map(len, data_of(text)["messages"])) < 500


def test_a_badge_counts_musts_and_says_so_without_colour(tmp_path: Path) -> None:
    runs = gather([write(tmp_path / "run", TEXT)])
    found = ElementTree.fromstring(badge(runs))
    texts = [node.text for node in found.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["MoE conformance of mine", "✗ 1/2 MUST"]
    good = gather([write(tmp_path / "good", lines(WHOLE[:1], {}))])
    assert "✓ 1/1 MUST" in badge(good)
    cut = gather([write(tmp_path / "cut", lines(WHOLE[:1], {})[:-1])])
    assert "✓ 1/1 MUST, cut off" in badge(cut)


def test_without_a_script_the_page_has_what_the_terminal_said(tmp_path: Path) -> None:
    text = html(gather([write(tmp_path / "run", TEXT)]))
    fallback = text.partition("<pre>")[2].partition("</pre>")[0].lstrip()
    assert re.match(r"MUST: failed of judged  mine 1.0\nshape-mismatch +1/2\n", fallback)
    assert "1. fail: shape-mismatch: output is right" in fallback


def test_without_jinja_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"want it installed: pip install 'moe-conformance\[report\]'"):
        html(gather([write(tmp_path / "run", TEXT)]))


def test_a_thread_has_an_address_where_its_repository_is_certain() -> None:
    assert address("vllm#41401") == "https://github.com/vllm-project/vllm/issues/41401"
    assert address("mobius#1") == address("vllm#1/../..") == ""

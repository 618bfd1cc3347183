"""Tile sizes that were measured are found again, and broken ones refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from moe_conformance.errors import InputError
from moe_conformance.kernels import tuning
from moe_conformance.kernels.tuning import Config, Problem, Tile, choose, default, file_name, read, write

DEVICE = "NVIDIA H200 (SXM), 141GB"
LIMITS = (227 * 1024, 32)  # an H200's
GEMMA4 = Problem(64, 8, 128, 2816, 704, torch.bfloat16)
SMALL = Config(16, Tile(32, 128, num_stages=5), Tile(64, 128, group_m=1), aligned=False)
LARGE = Config(128, Tile(128, 64, 32, 8, 4), Tile(256, 64, num_warps=8))

Keep = Callable[[Any], None]


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keep]:
    """Puts a file where the kernels of an H200 look."""
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path)
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(tuning, "limits", lambda device: LIMITS)
    tuning.kept.cache_clear()
    (tmp_path / "tuned").mkdir()
    yield lambda content: (tmp_path / "tuned" / file_name(DEVICE)).write_text(
        content if isinstance(content, str) else json.dumps({"configs": content})
    )
    tuning.kept.cache_clear()


def chosen(tokens: int) -> Config:
    return choose(Problem(tokens, 8, 128, 2816, 704, torch.bfloat16), torch.device("cuda"))


def test_a_kept_configuration_is_read_as_it_was_written(keep: Keep) -> None:
    keep({GEMMA4.key: {"64": {**write(LARGE), "us": 412.5, "default_us": 440.0}}})
    assert chosen(64) == LARGE


def test_the_nearest_number_of_tokens_is_chosen_by_ratio(keep: Keep) -> None:
    keep({GEMMA4.key: {"8": write(SMALL), "64": write(LARGE)}})
    assert [chosen(tokens) for tokens in (2, 8, 22, 23, 64, 256)] == [SMALL, SMALL, SMALL, LARGE, LARGE, LARGE]


def test_a_number_of_tokens_far_from_all_kept_ones_gets_the_default(keep: Keep) -> None:
    keep({GEMMA4.key: {"8": write(SMALL), "64": write(LARGE)}})
    for tokens in (0, 1, 257, 4096):
        assert chosen(tokens) == default(Problem(tokens, 8, 128, 2816, 704, torch.bfloat16), *LIMITS)


def test_other_shapes_and_devices_without_a_file_get_the_default(keep: Keep) -> None:
    wanted = default(GEMMA4, *LIMITS)
    assert chosen(64) == wanted
    tuning.kept.cache_clear()
    keep({GEMMA4.key + " plain": {"64": write(LARGE)}})
    assert chosen(64) == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_m": 48}, "block_m 48"),
        ({"block_m": True}, "block_m True"),
        ({"gate_up": {"block_n": "64", "block_k": 64}}, "gate_up.block_n '64'"),
        ({"down": {"block_n": 64}}, "block_k"),
        ({"down": {"block_n": 64, "block_k": 64, "stages": 3}}, "stages"),
        ({"down": {"block_n": 64, "block_k": 64, "num_stages": 0}}, "down.num_stages 0"),
        ({"aligned": 1}, "aligned 1"),
    ],
    ids=str,
)
def test_a_broken_entry_is_refused(keep: Keep, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(write(LARGE) | change)
    keep({GEMMA4.key: {"64": write(LARGE) | change}})
    with pytest.raises(InputError, match=words):
        chosen(64)


@pytest.mark.parametrize("content", ["{", "{}", '{"configs": []}', '{"configs": {"key": {"many": {}}}}'])
def test_a_file_that_is_no_such_file_is_refused_by_name(keep: Keep, content: str) -> None:
    keep(content)
    with pytest.raises(InputError, match=r"NVIDIA_H200_SXM_141GB\.json.*benchmarks/tune\.py"):
        chosen(64)


def test_every_kept_file_of_this_tree_is_readable() -> None:
    for path in (Path(__file__).parent.parent / "kernels" / "tuned").glob("*.json"):
        configs = json.loads(path.read_text())["configs"]
        assert configs and all(read(entry) for by_tokens in configs.values() for entry in by_tokens.values())

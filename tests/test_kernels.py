"""The kernels, interpreted on the CPU in a process of their own: this one's environment is left alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TWINS = Path(__file__).with_name("kernel_twins.py")
CHECKS = (
    "routing_is_the_reference_at_any_shape",
    "routing_reads_strided_logits_and_nothing_beside_them",
    "routing_breaks_ties_to_the_lowest_id",
    "routing_of_no_numbers_is_unique_and_leaves_other_rows_alone",
    "routing_of_no_tokens_is_empty",
    "routing_refuses_what_it_cannot_do",
    "resized_rows_keep_their_bits",
    "resizing_is_the_reference_at_any_width",
    "capture_is_the_reference",
    "capture_by_several_programs_is_the_reference",
    "refused_ids_change_nothing",
    "capture_refuses_what_it_cannot_do",
    "offsets_do_not_wrap_at_32_bits",
    "operators_trace_with_true_shapes",
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def outcome() -> dict[str, str | None]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", TWINS, "cpu"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_check_of_the_program_is_listed_here(outcome: dict[str, str | None]) -> None:
    assert sorted(outcome) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted(outcome: dict[str, str | None], check: str) -> None:
    assert outcome[check] is None, outcome[check]

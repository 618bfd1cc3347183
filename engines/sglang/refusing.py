"""What SGLang refuses, told from what it gets wrong: Unsupported in its own words."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator

from moe_conformance.engine import Unsupported

# Words of errors that refuse a form of call, among those of errors that check what was computed.
_REFUSING = (
    "nsupported",
    "not supported",
    "not yet supported",
    "is required for non-softmax routing",
    "Invalid scoring function",
    "only supports",
    "assert not apply_routed_scaling_factor_on_output",
    "assert _is_cuda",
    "assert swiglu_limit ==",
    "invalid group count",
    "assert intermediate_size % self.moe_tp_size",
    "assert self._num_global_routed %",
    "is not divisible by",
    "No module or parameter named",  # its loader of a model of transformers, which renames nothing
    "exceeds triton maximum tensor numel",  # a kernel for few pairs that is driven with many
    "Torch not compiled with CUDA enabled",
)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn SGLang's own refusals into Unsupported: no kernel, no such form or operator, a package that is absent."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        words = () if isinstance(error, TypeError) else _REFUSING  # whose own words are of operands
        kinds = isinstance(error, (NotImplementedError, ImportError))
        if not kinds and "'_OpNamespace'" not in str(error) and not any(word in said(error) for word in words):
            raise
        raise Unsupported(f"SGLang: {said(error)}") from error


def said(error: BaseException) -> str:
    """What an error says, in a line; of one without words, or an assertion, its place and line of code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:1]
    if lines and not isinstance(error, AssertionError):
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return lines[0] if lines else type(error).__name__
    inside, ours = f"{os.sep}sglang{os.sep}", os.path.dirname(__file__)
    theirs = [found for found in frames if inside in found.filename and not found.filename.startswith(ours)]
    frame = theirs[-1] if theirs else frames[-1]
    place = frame.filename.rpartition(inside)[2]
    code = " ".join((frame.line or "").split())
    return ": ".join(filter(None, (place, code or type(error).__name__, *lines)))

"""The process behind generating.py: `python -m moe_conformance.engines.vllm.serving QUESTION ANSWER`, both JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

MOST_TOKENS = 64
# Tokens of a block of the cache, the smallest that attention on a CPU takes; prefixes in common are longer.
BLOCK = 32


def main(question: Path, answer: Path) -> None:
    asked = json.loads(question.read_text())
    try:
        said = _served(asked)
    except Exception as error:
        words = " ".join(str(error).split())
        said = {"failed": f"{type(error).__name__}: {words[:300]}"}
    answer.write_text(json.dumps(said))


def _served(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["routed"]:
        from moe_conformance.engines.vllm import interpreted

        interpreted.install()
    from vllm import LLM, SamplingParams

    step = {"enable_chunked_prefill": True, "long_prefill_token_threshold": asked["step_tokens"]}
    options: dict[str, Any] = {
        "model": asked["folder"],
        "skip_tokenizer_init": True,
        "dtype": asked["dtype"],
        "block_size": BLOCK,
        "enforce_eager": True,
        "max_model_len": MOST_TOKENS,
        "max_num_seqs": 4,
        "max_num_batched_tokens": MOST_TOKENS,
        # Its connector of routes requires it.
        "enable_prefix_caching": asked["shares_prefixes"] or asked["routed"],
        "disable_log_stats": True,
        **(step if asked["step_tokens"] else {}),
        **({"enable_return_routed_experts": True} if asked["routed"] else {}),
        # One block is nobody's.
        **({"num_gpu_blocks_override": asked["cache_tokens"] // BLOCK + 1} if asked["cache_tokens"] else {}),
        **({"tensor_parallel_size": asked["ranks"]} if asked["ranks"] > 1 else {}),
    }
    engine = LLM(**options)
    # vLLM answers greedily but once; of one candidate every draw is the same.
    greedy = {"temperature": 0.0} if asked["answers_each"] == 1 else {"top_k": 1, "n": asked["answers_each"]}
    how = SamplingParams(max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False, **greedy)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    if asked["shares_prefixes"]:  # one after the other: what the first left is there for the second
        outputs = [engine.generate(request, how, use_tqdm=False)[0] for request in requests]
    else:
        with _withdrawing(engine.llm_engine, asked["withdrawn"]), _interruptions() as interrupted:
            outputs = engine.generate(requests, how, use_tqdm=False)
        if asked["cache_tokens"] and not interrupted:
            raise RuntimeError("no request was interrupted, though the cache does not hold all")
    answered = {int(output.request_id): output.outputs for output in outputs}
    tokens: list[list[int]] = []
    routed: list[Any] = []
    for number in range(len(requests)):
        if number in asked["withdrawn"]:
            tokens.append([])
            routed.append([])
            continue
        for completion in answered[number]:
            tokens.append(list(map(int, completion.token_ids)))
            routed.append(completion.routed_experts.tolist() if asked["routed"] else None)
    return {"tokens": tokens, "routed": routed if asked["routed"] else None}


@contextlib.contextmanager
def _withdrawing(engine: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Inside, these requests are aborted once the model has made its first step."""
    real, steps = engine.step, 0

    def step() -> Any:
        nonlocal steps
        answer = real()
        steps += 1
        if steps == 1 and numbers:
            engine.abort_request([str(number) for number in numbers])
        return answer

    with patch.object(engine, "step", step):
        yield


@contextlib.contextmanager
def _interruptions() -> Iterator[list[str]]:
    """The requests that the scheduler takes out of the cache, to go on with them later."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[str] = []
    real = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return real(self, request, *args, **kwargs)

    with patch.object(Scheduler, "_preempt_request", preempt):
        yield found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

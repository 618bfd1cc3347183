"""The process behind generating.py: `python -m moe_conformance.engines.vllm.serving QUESTION ANSWER`, both JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MOST_TOKENS = 64


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
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MOST_TOKENS,
        "max_num_seqs": 4,
        "max_num_batched_tokens": MOST_TOKENS,
        # Its connector of routes requires it.
        "enable_prefix_caching": asked["shares_prefixes"] or asked["routed"],
        "disable_log_stats": True,
        **(step if asked["step_tokens"] else {}),
        **({"enable_return_routed_experts": True} if asked["routed"] else {}),
    }
    engine = LLM(**options)
    how = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    if asked["shares_prefixes"]:  # one after the other: what the first left is there for the second
        outputs = [engine.generate(request, how, use_tqdm=False)[0] for request in requests]
    else:
        outputs = engine.generate(requests, how, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    routed = [completion.routed_experts.tolist() for completion in completions] if asked["routed"] else None
    return {"tokens": [list(map(int, completion.token_ids)) for completion in completions], "routed": routed}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Records what vLLM returns of a whole model of golden/whole-models, for tests/recorded: tokens and routed experts.

    python tools/record_routes.py qwen3-moe bfloat16 --out tests/recorded

In an environment with vLLM (docs/vllm.md). One JSON object a request, as `moe-conformance routes` reads them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from moe_conformance.engine import GenerateInputs
from moe_conformance.engines.vllm.generating import generate
from moe_conformance.suites.generate.models import whole_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = whole_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder))
        prompts = tuple(map(tuple, model.prompts))
        inputs = GenerateInputs(Path(folder), prompts, model.new_tokens, routed=True, dtype=options.dtype)
        answer = generate(inputs)
    assert answer.routed is not None
    import vllm

    path = options.out / f"vllm-{vllm.__version__.partition('+')[0]}-{options.model}-{options.dtype}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, tokens, routed in zip(prompts, answer.tokens, answer.routed, strict=True):
            said = {"prompt_token_ids": prompt, "token_ids": tokens, "routed_experts": routed.tolist()}
            file.write(json.dumps(said, separators=(",", ":")) + "\n")
    print(path)


if __name__ == "__main__":
    main()

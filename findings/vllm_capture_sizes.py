"""The sizes by which vLLM captures the experts of each token, without our suite: run beside 0.28 or later.

- DBRX: its counts lie in ffn_config, which vLLM's ModelConfig does not open. It counts no experts, and the capturer
  refuses that.
- LongCat: its router chooses identity experts as well, whose ids lie behind the experts that are counted.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import vllm
from transformers import DbrxConfig, LongcatFlashConfig
from vllm.engine.arg_utils import EngineArgs

for name, config, want in (
    ("DbrxForCausalLM", DbrxConfig(n_layers=2), "4 experts, 1 a token"),
    ("LongcatFlashForCausalLM", LongcatFlashConfig(num_layers=2), "512 experts and 256 more, 12 a token"),
):
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [name]}))
    lengths = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
    found = made.create_engine_config().model_config
    got = f"{found.get_num_experts()} experts, {found.get_num_experts_per_tok()} a token"
    print(vllm.__version__, f"{name}: want {want}, got {got}")

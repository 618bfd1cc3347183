"""SGLang's capturer of routed experts, without our suite: run beside 0.5.23.

It sizes its buffers by num_experts_per_tok and num_hidden_layers: Gemma 4 and LongCat have no such key, and HunYuan a
list. Layer -1 is the last layer. A batch of more rows, or fewer, than the server says is taken as it is.
"""

from types import SimpleNamespace
from unittest.mock import patch

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.configs.longcat_flash import LongcatFlashConfig
from sglang.srt.state_capturer import base, routed_experts
from transformers import Gemma4TextConfig

patch.object(base, "ALLOC_MEMORY_FUNCS", {"cpu": lambda shape, dtype, **_: torch.empty(shape, dtype=dtype)}).start()
patch.object(routed_experts, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=8)).start()


def capturer(config):
    return routed_experts.RoutedExpertsCapturer(SimpleNamespace(hf_text_config=config), 8, 8, 0, "cpu")


HunYuan = SimpleNamespace(num_experts_per_tok=[2, 2], num_hidden_layers=2)  # as its config is published
for config in (Gemma4TextConfig(), LongcatFlashConfig(), HunYuan):
    try:
        capturer(config)
    except Exception as error:
        print(f"{type(config).__name__}: {type(error).__name__}: {error}")
found = capturer(SimpleNamespace(num_experts_per_tok=1, num_hidden_layers=2))
found.capture(-1, torch.full((5, 1), 7, dtype=torch.int32))
batch = SimpleNamespace(out_cache_loc=torch.arange(3), out_cache_loc_virtual=None)
found.on_forward_end(batch, False, None)
print("5 rows of layer -1, of which 3 are the batch's:", found.host_cache.buffer[:4, :, 0].tolist())

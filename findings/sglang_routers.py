"""SGLang's routers on a CPU, without our suite: run beside 0.5.23.

With a selection bias, in groups, and in Gemma 4, scores have the dtype of the logits. Grouped routers refuse a batch of
no tokens. LFM2's 1e-6 is not added to the sum of weights. PhiMoE's takes one expert twice for a row of minus infinity.
"""

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe import topk
from sglang.srt.models.phimoe import phimoe_routing_function

torch.manual_seed(0)
logits, bias = torch.randn(1, 16).bfloat16(), torch.zeros(16)
x = torch.zeros(1, 1)
for name, call, score in (
    ("softmax", lambda g: topk.fused_topk_torch_native(x, g, 2, False, bias), torch.softmax),
    ("groups", lambda g: topk.grouped_topk_gpu(x, g, 2, False, 4, 4), torch.softmax),
    ("DeepSeek-V3", lambda g: topk.biased_grouped_topk_impl(x, g, bias, 2, False, 4, 4), lambda g, _: g.sigmoid()),
):
    weights, ids = call(logits)
    want = score(logits.float(), -1).gather(1, ids.long())
    print(f"{name}: got {weights[0].tolist()}, want {want[0].tolist()}")
for call in (topk.grouped_topk_gpu, topk.biased_grouped_topk_impl):
    arguments = (bias,) if call is topk.biased_grouped_topk_impl else ()
    try:
        call(x[:0], logits[:0].float(), *arguments, 2, True, 4, 4)
    except RuntimeError as error:
        print(f"no tokens: {call.__name__}: {error}")
tiny = torch.full((1, 16), -15.0)
weights, _ = topk.fused_topk_torch_native(x, tiny, 2, True, bias, "sigmoid")
score = tiny.sigmoid()[0, 0]
print(f"LFM2: got {weights[0, 0]:.6f}, want {score / (2 * score + 1e-6):.6f}")
print("PhiMoE:", phimoe_routing_function(x, torch.full((1, 16), -torch.inf), 2, False)[1].tolist())

"""vLLM's reload of weights and its experts on a CPU, without our suite: run beside 0.28 or later.

A reload loads a layer anew, lays it out for its kernel, and copies that into the tensors that the layer had. On a CPU,
where experts are laid out for the kernel in place, pushing the same weights again gives another output, and so does
each push after it.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.model_loader import reload

E, D, F = 4, 64, 32
text = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text | {"num_local_experts": 1, "max_position_embeddings": 256}))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
arguments = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
config = arguments.create_engine_config()
torch.manual_seed(0)
w1, w3, w2 = torch.randn(E, F, D) / 8, torch.randn(E, F, D) / 8, torch.randn(E, D, F) / 6
x, logits = torch.randn(3, D), torch.randn(3, E)


def load(experts: torch.nn.Module) -> None:
    """As a model's load_weights does, each expert's tensors by the parameter's own loader."""
    parameters = dict(experts.named_parameters())
    for expert in range(E):
        for name, shard, tensor in (("w13", "w1", w1), ("w13", "w3", w3), ("w2", "w2", w2)):
            parameter = getattr(experts, f"{name}_weight", parameters.get(f"{name}_weight"))
            parameter.weight_loader(
                parameter, tensor[expert], f"experts.{name}_weight", shard_id=shard, expert_id=expert
            )


with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    sizes = {"num_experts": E, "top_k": 2, "hidden_size": D, "intermediate_size": F, "params_dtype": torch.float32}
    layer = fused_moe.FusedMoEFactory(**sizes, prefix="model.layers.0.experts", renormalize=True)
    experts = layer.routed_experts
    reload.record_metadata_for_reloading(layer)
    load(experts)
    experts.quant_method.process_weights_after_loading(experts)
    weights, ids = logits.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    each = torch.einsum(
        "tef,edf->ted",
        torch.nn.functional.silu(torch.einsum("td,efd->tef", x, w1)) * torch.einsum("td,efd->tef", x, w3),
        w2,
    )
    want = (each.gather(1, ids[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)
    for push in range(3):
        with override_forward_context(create_forward_context(None, config)), torch.no_grad():
            got = layer(hidden_states=x.clone(), router_logits=logits.clone())
        error = (got - want).abs().max()
        print(vllm.__version__, f"after {push} pushes of the same weights: largest error {error:.2g}")
        with torch.no_grad():
            reload.initialize_layerwise_reload(layer)
            load(experts)
            reload.finalize_layerwise_reload(layer, config.model_config)

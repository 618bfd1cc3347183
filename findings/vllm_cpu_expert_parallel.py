"""vLLM's experts on a CPU under expert parallelism, two ranks, without our suite: run beside 0.28 or later.

Each rank has half of the experts, and its kernel is given global ids and no map of them: `CPUUnquantizedExperts.apply`
ignores expert_map. A rank computes pairs of experts that it does not have from whatever lies behind its weights: with
tensor parallelism alone the layer is right, with --enable-expert-parallel it is not, or dies.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("VLLM_DIST_IDENT", f"by-hand-{os.getpid()}")
E, K, T, D, F = 8, 2, 6, 64, 64


def one_rank(rank: int, parallel: bool, folder: Path) -> None:
    import torch
    import vllm
    import vllm.model_executor.layers.fused_moe as fused_moe
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import create_forward_context, override_forward_context

    torch.manual_seed(0)
    w13, w2, x, logits = (torch.randn(s) / 4 for s in ((E, 2 * F, D), (E, D, F), (T, D), (T, E)))
    lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": parallel}
    arguments = EngineArgs(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths, **ranks
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(2, rank, f"file://{folder}/store{parallel}", rank, "gloo")
        initialize_model_parallel(2, 1)
        build = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
        layer = build(
            num_experts=E, top_k=K, hidden_size=D, intermediate_size=F, params_dtype=torch.float32, prefix="m.0"
        )
        experts = getattr(layer, "routed_experts", layer)
        for expert in range(E):
            for name, part, value in (
                ("w13_weight", "w1", w13[expert, :F]),
                ("w13_weight", "w3", w13[expert, F:]),
                ("w2_weight", "w2", w2[expert]),
            ):
                parameter = getattr(experts, name)
                parameter.weight_loader(parameter, value, name, shard_id=part, expert_id=expert)
        experts.quant_method.process_weights_after_loading(experts)
        with override_forward_context(create_forward_context(None, config)):
            got = layer(hidden_states=x.clone(), router_logits=logits.clone())
    if rank == 0:
        weights, ids = logits.softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        want = torch.zeros(T, D)
        for token in range(T):
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                gate, up = (w13[expert] @ x[token]).chunk(2)
                want[token] += weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
        what = "expert parallel" if parallel else "tensor parallel"
        print(
            vllm.__version__,
            f"{what}: largest error {(got - want).abs().max():.2g}, of values up to {want.abs().max():.2g}",
        )


if len(sys.argv) > 1:
    one_rank(int(sys.argv[1]), sys.argv[2] == "True", Path(sys.argv[3]))
    sys.exit()
text = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": D, "intermediate_size": F}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
text |= {"num_local_experts": E, "num_experts_per_tok": K, "max_position_embeddings": 256}
for parallel in (False, True):
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(text))
        command = [sys.executable, "-P", __file__]
        ranks = [subprocess.Popen([*command, str(rank), str(parallel), name]) for rank in (0, 1)]
        for rank in ranks:
            try:
                rank.wait(300)
            except subprocess.TimeoutExpired:
                rank.kill()  # it waits for one that died
        print(f"expert parallel {parallel}: exit codes", [rank.wait() for rank in ranks])

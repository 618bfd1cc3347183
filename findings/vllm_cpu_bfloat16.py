"""What dies in vLLM on a CPU with AMX in bfloat16, without our suite: run beside 0.28 or later, with its libraries.

- Experts that are the first to use AMX in their process: illegal instruction, for their kernel does not ask Linux for
  it. In a server a projection has asked before.
- HY-V3's router, whose weights are float32, in 0.28.0: they are packed, and an empty parameter of the model's dtype
  stands in their place. Its dtype is taken for theirs, and bfloat16 handed to a product of float32, which reads beyond
  it: it aborts, or answers with garbage. 0.32 is right.
"""

import inspect
import os
import subprocess
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import vllm


def experts() -> None:
    import torch
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    w13, w2, x = (torch.ones(shape, dtype=torch.bfloat16) / 32 for shape in ((2, 64, 32), (2, 32, 32), (1, 32)))
    packed = [cpu_prepack_moe_weight(w, "amx") for w in (w13, w2)]
    ids = torch.zeros(1, 1, dtype=torch.int32)
    given = (x, *packed, None, None, torch.ones(1, 1), ids, "silu", "amx")
    out = torch.empty_like(x)
    if "out" in inspect.signature(cpu_fused_moe).parameters:
        cpu_fused_moe(out, *given)
    else:
        out = cpu_fused_moe(*given)
    print("  experts answer", out[0, 0].item())


def router() -> None:
    import tempfile

    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe import GateLinear

    torch.cpu._init_amx()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(torch.bfloat16)  # as a loader has it
        gate = GateLinear(96, 12, bias=False, out_dtype=torch.float32, params_dtype=torch.float32)
        gate.weight.data.fill_(0.5)
        gate.quant_method.process_weights_after_loading(gate)
        print("  router answers", gate(torch.ones(1, 96, dtype=torch.bfloat16))[0][0, 0].item(), "want 48.0")


if len(sys.argv) > 1:
    {"experts": experts, "router": router}[sys.argv[1]]()
    sys.exit()
for what in ("experts", "router"):
    done = subprocess.run([sys.executable, "-P", __file__, what], stderr=subprocess.DEVNULL)
    print(vllm.__version__, f"{what}: exit code {done.returncode}", flush=True)

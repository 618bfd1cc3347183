"""The transformers adapter itself: what its stages read, and that it costs nothing until used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_conformance.engine import LayerInputs, RouteInputs
from moe_conformance.engines.reference import Reference
from moe_conformance.engines.transformers import Transformers
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, normal
from moe_conformance.oracle.bounds import sums


def test_the_adapter_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from moe_conformance.engines.transformers import Transformers as T; T.missing(); T().info;"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_top_k_is_what_the_forward_does_and_not_what_the_config_says() -> None:
    """PhiMoE's sparsemixer picks two experts whatever num_experts_per_tok is."""
    config = {"model_type": "phimoe", "num_hidden_layers": 2, "num_local_experts": 6, "num_experts_per_tok": 3}
    assert Transformers().describe(config).top_k == 2


def test_a_config_whose_model_cannot_run_is_refused() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "n_routed_experts": 11, "n_group": 8}
    with pytest.raises(ConfigError, match="DeepseekV3MoE of this config cannot run"):
        Transformers().describe(config)


def test_a_dense_model_is_refused_by_name() -> None:
    with pytest.raises(DenseModelError, match=r"gemma3_text.* has no routed experts"):
        Transformers().describe({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}})


@pytest.mark.parametrize("method", ["softmax_topk", "softmax_topk_renorm", "gemma4"])
def test_an_infinite_logit_touches_only_its_expert(method: str) -> None:
    """The given logits do not pass through a product with an identity, where 0 * inf would be NaN."""
    logits = distinct_logits(3, 7, "infinite")
    logits[:, 2] = -torch.inf
    scale = torch.ones(7) if method == "gemma4" else None
    ids, weights = Transformers().route(RouteInputs(logits, 6, method, scale))  # type: ignore[arg-type]
    assert ids.sort().values.tolist() == [[0, 1, 3, 4, 5, 6]] * 3
    assert weights.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("method", ["softmax_topk", "softmax_topk_renorm"])
def test_every_experts_implementation_computes_the_layer(implementation: str, method: str) -> None:
    tokens, experts, hidden, width, shared = 63, 7, 16, 8, 32  # rows of a multiple of 16 bytes, as grouped_mm wants
    inputs = LayerInputs(
        x=normal((tokens, hidden), "x"),
        logits=distinct_logits(tokens, experts, "logits"),
        w13=normal((experts, 2 * width, hidden), "w13", std=0.25),
        w2=normal((experts, hidden, width), "w2", std=0.25),
        top_k=3,
        method=method,  # type: ignore[arg-type]
        activation="gelu_tanh",
        scale=2.5,
        shared_w13=normal((2 * shared, hidden), "shared-w13", std=0.25),
        shared_w2=normal((hidden, shared), "shared-w2", std=0.25),
    )
    engine = Transformers()
    engine.experts_implementation = implementation
    want = Reference().layer(inputs)
    bound = sums(want.abs().amax().expand(want.shape), 3 * hidden * width, torch.float32, "both sides in float32")
    compare.close("layer output", engine.layer(inputs), want, bound)

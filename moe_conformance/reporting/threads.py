"""Addresses of the public threads that clauses name, such as vllm#41401."""

from __future__ import annotations

# A repository whose owner is uncertain is not listed; its threads are shown as text.
_OWNERS = {
    "Automodel": "NVIDIA-NeMo",
    "FastDeploy": "PaddlePaddle",
    "Liger-Kernel": "linkedin",
    "Megatron-Bridge": "NVIDIA-NeMo",
    "Model-Optimizer": "NVIDIA",
    "PaddleFormers": "PaddlePaddle",
    "SkyRL": "NovaSky-AI",
    "TensorRT-LLM": "NVIDIA",
    "TileOPs": "tile-ai",
    "TransformerEngine": "NVIDIA",
    "Triton-distributed": "ByteDance-Seed",
    "aiter": "ROCm",
    "auto-round": "intel",
    "flashinfer": "flashinfer-ai",
    "megablocks": "databricks",
    "sglang": "sgl-project",
    "sglang-jax": "sgl-project",
    "tokenspeed": "lightseekorg",
    "torchtitan": "pytorch",
    "transformers": "huggingface",
    "unsloth-zoo": "unslothai",
    "vllm": "vllm-project",
    "vllm-ascend": "vllm-project",
    "vllm-gaudi": "vllm-project",
    "vllm-musa": "MooreThreads",
    "vllm-xpu-kernels": "vllm-project",
}


def address(thread: str) -> str:
    """GitHub forwards /issues/N to the pull request where N is one. Empty where the repository is not known."""
    repository, _, number = thread.partition("#")
    owner = _OWNERS.get(repository)
    return f"https://github.com/{owner}/{repository}/issues/{number}" if owner and number.isdecimal() else ""

"""SGLang without a GPU or a server, for the scripts beside this one: import it before anything of sglang's.

Packages that SGLang imports and these scripts do not use have empty stand-ins; one rank is told of itself.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from types import SimpleNamespace

os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
from transformers.utils import import_utils

NAMES = ("gguf", "sentencepiece", "sgl_kernel", "torchvision", "tvm_ffi", "xgrammar")
ABSENT = [name for name in NAMES if importlib.util.find_spec(name) is None]
for name in ABSENT:
    getattr(import_utils, f"is_{name}_available", bool)()  # transformers keeps its answer


class Nothing(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {"__get_pydantic_core_schema__": lambda *_: {"type": "any"}})


class Package(types.ModuleType):
    __getattr__ = Nothing.__getattr__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    create_module = staticmethod(lambda spec: Package(spec.name))
    exec_module = staticmethod(lambda module: None)


sys.meta_path.append(Finder())
torch.set_grad_enabled(False)
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402

get_context().override_server_args(device="cpu").install()
ranks = ("attn_cp", "attn_dp", "attn_tp", "moe_dp", "moe_ep", "moe_tp", "pp", "tp")
group = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
groups = dict.fromkeys(("attn_tp_group", "moe_ep_group", "moe_tp_group", "pp_group", "tp_group"), group)
place = get_parallel().override(**{f"{name}_rank": 0 for name in ranks}, **groups)
place.__enter__()  # for good

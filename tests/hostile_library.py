"""What an engine may do in a call, each kind with the verdict that its case comes to.

An act gets the layer's inputs and the function that computes it right. tests/hostile_engines.py is the adapter.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import itertools
import json
import locale
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

Right = Callable[[Any], Tensor]


class Kind(NamedTuple):
    """verdict: of the case, and words of its message; later: what one finds when one looks back."""

    act: Callable[[Any, Right], Any]
    verdict: str
    words: str = ""
    later: str = ""


KINDS: dict[str, Kind] = {}
# Those that end the process; a new one costs seconds.
ENDING: dict[str, Kind] = {}


def kind(verdict: str, words: str = "", later: str = "", into: dict[str, Kind] = KINDS) -> Callable[[Any], Any]:
    def note(act: Any) -> Any:
        into[act.__name__] = Kind(act, verdict, words, later)
        return act

    return note


def ending(verdict: str, words: str = "", later: str = "") -> Callable[[Any], Any]:
    return kind(verdict, words, later, ENDING)


def changes(name: str, change: Callable[[], object]) -> None:
    """Right in its answer; what it leaves otherwise is none of the judge's business."""

    def act(inputs: Any, right: Right) -> Tensor:
        change()
        return right(inputs)

    KINDS[name] = Kind(act, "pass")


def raises(name: str, error: Callable[[], BaseException], words: str) -> None:
    def act(inputs: Any, right: Right) -> Tensor:
        raise error()

    KINDS[name] = Kind(act, "fail", words)


def answers(name: str, verdict: str, words: str, answer: Callable[[Any, Tensor], Any]) -> None:
    KINDS[name] = Kind(lambda inputs, right: answer(inputs, right(inputs)), verdict, words)


# What it leaves changed.


class Through(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def prints() -> None:
    print("x" * 1_000_000)
    print('{"kind": "Answer"}', file=sys.stderr, flush=True)


def replaces_its_output() -> None:
    empty = os.open(os.devnull, os.O_WRONLY)
    os.dup2(empty, 1)
    os.dup2(empty, 2)
    os.close(empty)


def closes_its_output() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


changes("changes_folder", lambda: os.chdir("/"))
changes("goes_where_nothing_is", lambda: (os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")))
changes("changes_umask", lambda: os.umask(0o777))
changes("changes_locale", lambda: locale.setlocale(locale.LC_ALL, "C"))
changes("empties_its_environment", os.environ.clear)
changes("changes_default_dtype", lambda: torch.set_default_dtype(torch.float16))
changes("changes_default_device", lambda: torch.set_default_device("meta"))
changes("forbids_gradients", lambda: torch.set_grad_enabled(False))
changes("allows_gradients", lambda: torch.set_grad_enabled(True))
changes("stays_in_inference_mode", lambda: torch.inference_mode().__enter__())
changes("stays_in_a_mode", lambda: Through().__enter__())
changes("flushes_denormals", lambda: torch.set_flush_denormal(True))
changes("lowers_precision", lambda: torch.set_float32_matmul_precision("medium"))
changes("asks_for_determinism", lambda: torch.use_deterministic_algorithms(True))
changes("changes_threads", lambda: torch.set_num_threads(2))
changes("seeds", lambda: (torch.manual_seed(0), random.seed(0), np.random.seed(0)))
changes("makes_warnings_errors", lambda: warnings.simplefilter("error"))
changes("warns_without_end", lambda: [warnings.warn(f"number {number}", stacklevel=1) for number in range(3000)])
changes("makes_numpy_raise", lambda: np.seterr(all="raise"))
changes("allows_little_recursion", lambda: sys.setrecursionlimit(800))
changes("turns_gc_off", gc.disable)
changes("stops_the_clock", lambda: [setattr(time, name, lambda: 0.0) for name in ("time", "monotonic", "perf_counter")])
changes("patches_a_function_of_torch", lambda: setattr(torch, "softmax", None))
changes("refuses_to_end", lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)])
changes("sets_an_alarm_and_takes_it", lambda: (signal.signal(signal.SIGALRM, lambda *_: None), signal.alarm(1)))
changes("leaves_a_thread", lambda: threading.Thread(target=time.sleep, args=(60,)).start())
changes("hangs_at_its_end", lambda: atexit.register(time.sleep, 60))
changes("prints_at_its_end", lambda: atexit.register(print, "x" * 100_000))
changes("prints", prints)
changes("replaces_its_output", replaces_its_output)
changes("closes_its_output", closes_its_output)
changes("reads_its_input", lambda: sys.stdin.read())


# What it answers.


class Agrees(Tensor):
    """Is whatever one compares it with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
            return (found * 0 if func is Tensor.abs else found).as_subclass(Agrees)

    def __eq__(self, other: object) -> Any:
        return torch.ones(self.shape, dtype=torch.bool)


class CallsItselfATensor:
    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    @property
    def __class__(self) -> Any:
        return Tensor


class RaisesWhenLookedAt:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


def nested(depth: int) -> Any:
    found: Any = ()
    for _ in range(depth):
        found = [found]
    return found


def emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


answers("is_wrong", "fail", "times the bound", lambda inputs, right: right + 1)
answers("is_its_input", "fail", "times the bound", lambda inputs, right: inputs.x)
answers("is_a_view_of_its_input", "fail", "times the bound", lambda inputs, right: inputs.x.view_as(inputs.x))
answers("overwrites_its_input", "fail", "the engine wrote into its input", lambda inputs, right: inputs.x.copy_(right))
answers("is_strided", "pass", "", lambda inputs, right: right.t().contiguous().t())
answers("is_a_parameter", "pass", "", lambda inputs, right: torch.nn.Parameter(right))
answers("is_lazily_negated", "pass", "", lambda inputs, right: torch._neg_view(-right))
answers("is_of_a_class_that_agrees", "fail", "times the bound", lambda inputs, right: (right + 1).as_subclass(Agrees))
answers("is_nan", "fail", "got nan", lambda inputs, right: right * float("nan"))
answers("is_infinite", "fail", "got inf", lambda inputs, right: right + float("inf"))
answers("is_float64", "fail", "layer output's dtype", lambda inputs, right: right.double())
answers("is_complex", "fail", "got torch.complex64, want a float", lambda inputs, right: right.to(torch.complex64))
answers("is_fake", "fail", "got a FakeTensor", lambda inputs, right: FakeTensorMode().from_tensor(right))
answers("is_meta", "fail", "got a Tensor, torch.strided on meta", lambda inputs, right: right.to("meta"))
answers("is_sparse", "fail", "got a Tensor, torch.sparse_coo on cpu", lambda inputs, right: right.to_sparse())
answers("is_without_end", "fail", "want [", lambda inputs, right: right[:1].expand(1 << 40, right.shape[1]))
answers("is_nothing", "fail", "got NoneType", lambda inputs, right: None)
answers("is_a_pair", "fail", "got tuple", lambda inputs, right: (right, right))
answers("is_an_array", "fail", "got ndarray", lambda inputs, right: right.numpy())
answers("is_a_generator", "fail", "got generator", lambda inputs, right: (row for row in right))
answers("never_ends", "fail", "got count", lambda inputs, right: itertools.count())
answers("is_very_deep", "fail", "got list", lambda inputs, right: nested(100_000))
answers("calls_itself_a_tensor", "fail", "got CallsItselfATensor", lambda inputs, right: CallsItselfATensor(right))
answers("raises_when_looked_at", "fail", "got RaisesWhenLookedAt", lambda inputs, right: RaisesWhenLookedAt())


# What it raises.


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def with_a_name_of_two_lines() -> BaseException:
    return type("Two\nLines", (Exception,), {})("\x1b[31mred\ud800")


raises("raises_what_has_no_words", Mute, "Mute")
raises("raises_a_name_of_two_lines", with_a_name_of_two_lines, "red")
raises("raises_a_megabyte", lambda: ValueError("x" * 1_000_000), "characters left out")
raises("raises_stop_iteration", lambda: StopIteration(1), "StopIteration")
raises("raises_a_group", lambda: ExceptionGroup("many", [ValueError("one")]), "ExceptionGroup")
raises("raises_memory_error", MemoryError, "MemoryError")


STATE = (
    "changes_folder",
    "changes_umask",
    "changes_default_dtype",
    "changes_default_device",
    "forbids_gradients",
    "stays_in_autocast",
    "lowers_precision",
    "asks_for_determinism",
    "changes_threads",
    "makes_warnings_errors",
    "makes_numpy_raise",
    "allows_little_recursion",
    "turns_gc_off",
)
"""What changes what judging/state.py keeps."""


@kind("fail", "times the bound")
def stays_in_autocast(inputs: Any, right: Right) -> Tensor:
    torch.autocast("cpu", torch.bfloat16).__enter__()
    return right(inputs)


@kind("fail", "RecursionError")
def recurses(inputs: Any, right: Right) -> Tensor:
    return recurses(inputs, right)


@kind("fail", "")
def allocates_what_no_machine_has(inputs: Any, right: Right) -> Tensor:
    return torch.empty(1 << 50, dtype=torch.float64)


# What stays patched, for an engine's modules are its own.

changes("takes_open_away", lambda: setattr(builtins, "open", None))
changes("takes_print_away", lambda: setattr(builtins, "print", None))


# What ends it.


@ending("crash", "exit code 0")
def exits(inputs: Any, right: Right) -> Tensor:
    sys.exit(0)


@ending("crash", "signal SIGSEGV")
def answers_what_has_lost_its_memory(inputs: Any, right: Right) -> Tensor:
    return emptied(right(inputs).clone())


@ending("crash", "KeyboardInterrupt")
def interrupts(inputs: Any, right: Right) -> Tensor:
    raise KeyboardInterrupt


@ending("crash", "of its own")
def raises_no_exception(inputs: Any, right: Right) -> Tensor:
    raise type("Own", (BaseException,), {})("of its own")


@ending("crash", "signal SIGSEGV")
def overflows_the_stack(inputs: Any, right: Right) -> Tensor:
    """In C, where Python does not count: glibc's parser of expressions calls itself for each parenthesis."""
    ctypes.CDLL(None).regcomp(ctypes.create_string_buffer(256), b"(" * 10_000_000, 1)
    return right(inputs)


def _by_signal(name: str) -> None:
    @ending("crash", f"signal {name}")
    def act(inputs: Any, right: Right) -> Tensor:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)
        return right(inputs)

    ENDING[f"ends_by_{name.lower()}"] = ENDING.pop("act")


for _name in ("SIGABRT", "SIGALRM", "SIGBUS", "SIGTERM"):
    _by_signal(_name)


@ending("crash", "signal SIGBUS")
def reads_a_shard_that_is_cut_short(inputs: Any, right: Right) -> Tensor:
    """While it is mapped, as a download that is begun anew does."""
    save_file({"w": torch.ones(1 << 20)}, "shard.safetensors")
    with safe_open("shard.safetensors", framework="pt") as shard:
        os.truncate("shard.safetensors", 4096)
        return right(inputs) + shard.get_tensor("w").sum()


@ending("timeout", "no answer within")
def stops(inputs: Any, right: Right) -> Tensor:
    os.kill(os.getpid(), signal.SIGSTOP)
    return right(inputs)


@ending("timeout", "no answer within")
def hears_nothing(inputs: Any, right: Right) -> Tensor:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1)


@ending("crash", "Bad file descriptor")
def closes_all_files(inputs: Any, right: Right) -> Tensor:
    os.closerange(3, 1000)
    return right(inputs)


@ending("pass", "", "error")
def forks(inputs: Any, right: Right) -> Tensor:
    os.fork()
    return right(inputs)


@ending("error", "want a line of messages.py")
def patches_json(inputs: Any, right: Right) -> Tensor:
    json.dumps = lambda *_, **__: "{}"  # type: ignore[assignment]
    return right(inputs)


@ending("error", "want a line of messages.py")
def writes_where_it_answers(inputs: Any, right: Right) -> Tensor:
    os.write(int(sys.argv[5]), b"nonsense\n")
    return right(inputs)


@ending("pass", "", "crash")
def dies_a_little_later(inputs: Any, right: Right) -> Tensor:
    threading.Timer(0.05, os._exit, (7,)).start()
    return right(inputs)

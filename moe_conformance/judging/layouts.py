"""The same numbers as an engine may be given them: with other strides, at an offset, in another integer dtype."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from moe_conformance.errors import Broken, Nonconformance, Undecided, Unsupported
from moe_conformance.judging.inputs import poison_

T = TypeVar("T")


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """These values with the layout of that name, with poison between them; "expanded" repeats the first row instead.

    columns: a part of wider rows. sliced: every other column of wider rows. transposed: the last two dims lie the
    other way round; swapped: the first two. offset: contiguous, and not at the beginning of its memory. expanded: all
    rows are one, with a stride of 0. far: the last row lies more than 2^31 elements behind the first. A name of a dtype
    converts.
    """
    width = tensor.shape[-1]
    match how:
        case "contiguous":
            return tensor
        case "transposed":
            return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
        case "swapped":
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        case "expanded":
            return tensor[:1].expand(tensor.shape)
        case "offset":
            memory = poison_(torch.empty(tensor.numel() + 3, dtype=tensor.dtype))
            return memory[3:].view(tensor.shape).copy_(tensor)
        case "columns":
            return poison_(torch.empty(*tensor.shape[:-1], width + 5, dtype=tensor.dtype))[..., 2:-3].copy_(tensor)
        case "far":
            return far_apart(tensor)
        case "sliced":
            memory = poison_(torch.empty(*tensor.shape[:-1], 2 * width + 3, dtype=tensor.dtype))
            return memory[..., 1 : 2 * width : 2].copy_(tensor)
    dtype: torch.dtype = getattr(torch, how)
    return tensor.to(dtype)


def given_as(arguments: Mapping[str, str], given: Collection[str] | None, name: str, tensor: Tensor) -> Tensor:
    """An argument as `arguments` says, or, where `given` names others alone, the same values as usual."""
    how = arguments.get(name, "contiguous")
    if given is None or name in given:
        return laid_out(tensor, how)
    return laid_out(tensor, how).contiguous() if how == "expanded" else tensor


def assert_holds(stage: str, what: str, judge: Callable[[bool], None]) -> None:
    """The stage is right with something special, of which its clause is about: judge(True), otherwise judge(False).

    Raises Unsupported where it is wrong or raises otherwise, too, which is for the checks of other classes.
    """
    try:
        judge(True)
    except (Unsupported, Undecided, Broken):
        raise
    except Exception as error:
        try:
            judge(False)
        except (Undecided, Broken):
            raise
        except Unsupported:
            raise error from None
        except Exception:
            raise Unsupported(f"{stage}: not judged with {what}, for it is wrong otherwise, too") from error
        if isinstance(error, Nonconformance):
            raise Nonconformance(f"with {what}, and right otherwise: {error}") from error
        raise


def assert_honoured(stage: str, arguments: Mapping[str, str], judge: Callable[[Collection[str]], None]) -> None:
    """The stage reads its arguments as they are given, or refuses them.

    arguments: name -> how it is given. judge: raises Nonconformance where the stage is wrong when the arguments of
    these names are given so, and the others as usual. Raises Unsupported where the stage raises for them and for
    nothing else, and where it is wrong however they are given, which is for the checks of other classes.
    """
    said = ", ".join(f"{name} {how}" for name, how in arguments.items())
    try:
        judge(arguments)
    except Unsupported:
        raise
    except Nonconformance as error:
        if _is_wrong(judge, ()):
            raise Unsupported(f"{stage}: not judged with {said}, for it is wrong otherwise, too") from error
        for name in arguments:
            if _is_wrong(judge, (name,)):
                said = f"{name} {arguments[name]}"
                break
        raise Nonconformance(f"with {said}, and right otherwise: {error}") from error
    except Exception as error:
        judge(())
        raise _refusal(stage, said, error) from error


def or_refused(stage: str, said: str, call: Callable[[], T], plain: Callable[[], object]) -> T:
    """What the call gives. Raises Unsupported where it raises and `plain`, the same as usual, does not."""
    try:
        return call()
    except (Nonconformance, Unsupported):
        raise
    except Exception as error:
        plain()
        raise _refusal(stage, said, error) from error


def _refusal(stage: str, said: str, error: Exception) -> Unsupported:
    reason = str(error).partition("\n")[0]
    return Unsupported(f"{stage}: refuses {said}: {type(error).__name__}: {reason}")


def _is_wrong(judge: Callable[[Collection[str]], None], given: Collection[str]) -> bool:
    try:
        judge(given)
    except Nonconformance:
        return True
    except Exception:
        return False
    return False


def far_apart(tensor: Tensor) -> Tensor:
    """The same rows, so far apart that the last begins more than 2^31 elements behind the first.

    In a file of its own that is deleted at once, of which only the pages of the rows are ever written. Raises
    Unsupported where there can be no such file.
    """
    rows = len(tensor)
    if rows < 2:
        return tensor
    step = -(-(2**31 + 8) // (rows - 1))
    row = tensor[0].numel()
    elements = (rows - 1) * step + row
    size = elements * tensor.element_size()
    try:
        with tempfile.NamedTemporaryFile(prefix="moe-conformance-far-") as file:
            file.truncate(size)
            memory = torch.from_file(file.name, shared=True, size=elements, dtype=tensor.dtype)
    except (OSError, RuntimeError) as error:
        raise Unsupported(
            f"rows far apart: no sparse file of {size >> 30} GiB in {tempfile.gettempdir()}: {error}"
        ) from error
    return memory.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride())).copy_(tensor)

"""A record of routed experts, as engines return it: one file, which is read whole or refused by one error.

Three forms (docs/routes.md): .npy, one request's experts, with its token ids in another .npy; .safetensors, tensors by
request; .jsonl, a response of an engine a line. Nothing of a record is executed: pickles are refused, not opened.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_conformance.checkpoints.headers import Damaged, Stored, read_header
from moe_conformance.checkpoints.json_files import open_at_once, parsed
from moe_conformance.errors import CheckpointError, InputError
from moe_conformance.quote import few, plainly, quoted

Ints = npt.NDArray[np.int64]

# Bytes of one array; 60 layers of 8 experts in 32 bits take 1,920 a token.
MOST_BYTES = 4 * 2**30
# Bytes of one line, which is parsed as a whole.
MOST_LINE = 2**28
# What an array of ids may be stored as, by safetensors' word; vLLM returns uint8 up to 256 experts and uint16 beyond,
# SGLang int32.
INTEGERS = {"U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8", "I64": "i8"}
_TENSOR = re.compile(r"(tokens|routed_experts|positions|rank)\.(0|[1-9][0-9]{0,8})")
_WANT = "tokens.N [tokens] and routed_experts.N [rows, layers, k] for each request N, perhaps positions.N and rank.N"


class RecordError(InputError):
    """The record cannot be read, or is not what it must be; the message names the file and what to do."""


@dataclass(frozen=True)
class Request:
    """name: as the record calls it. tokens: [S], of prompt and answer. ids: [rows, layers, k], as they were returned.

    positions: [rows], of which token each row is. is_sample: the record says so itself, so that rows may lack anywhere.
    rank: of data parallelism, that served it, or None.
    """

    name: str
    tokens: Ints
    ids: Ints
    positions: Ints
    is_sample: bool = False
    rank: int | None = None


def read_record(path: Path, tokens: Path | None = None) -> list[Request]:
    """Raises RecordError. tokens: of an .npy record, which has none itself."""
    form = path.suffix
    if (form == ".npy") != (tokens is not None):
        what = "got none" if tokens is None else f"got {tokens}"
        raise RecordError(f"--tokens: {what}; an .npy record takes one, an .npy of its token ids, and no other does")
    if form == ".npy":
        assert tokens is not None
        found = [_request(str(path), "0", _npy_file(tokens), _npy_file(path))]
    elif form == ".safetensors":
        found = list(_of_safetensors(path))
    elif form == ".jsonl":
        found = list(_of_lines(path))
    else:
        raise RecordError(f"{path}: got {form or 'no ending'}, want .npy, .safetensors or .jsonl; save it as one")
    if not found:
        raise RecordError(f"{path}: got no request, want at least one; save the answers that came with routed experts")
    return found


def _request(where: str, name: str, tokens: Any, ids: Any, positions: Any = None, rank: int | None = None) -> Request:
    tokens, ids = _integers(f"{where}: tokens", tokens, 1), _integers(f"{where}: routed experts", ids, 3)
    rows = len(ids)
    if not ids.size or not tokens.size:
        raise RecordError(f"{where}: got {list(ids.shape)} routed experts of {len(tokens)} tokens, want at least one")
    if positions is not None:
        positions = _integers(f"{where}: positions", positions, 1)
        if len(positions) != rows:
            raise RecordError(f"{where}: positions: got {len(positions)}, want {rows}, one of each row")
        if positions.min() < 0 or positions.max() >= len(tokens) or (np.diff(positions) <= 0).any():
            raise RecordError(f"{where}: positions: got {few(positions.tolist())}, want ascending, below {len(tokens)}")
        return Request(name, tokens, ids, positions, True, rank)
    if rows > len(tokens):
        raise RecordError(f"{where}: got {rows} rows, want at most {len(tokens)}, the tokens; say which with positions")
    return Request(name, tokens, ids, np.arange(rows), False, rank)


def _integers(where: str, array: Any, dims: int) -> Ints:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise RecordError(f"{where}: got {got}, want integers; save the ids themselves")
    if array.ndim != dims:
        want = "[rows, layers, k]" if dims == 3 else "one dimension"
        raise RecordError(f"{where}: got shape {list(array.shape)}, want {want}; save one request's alone")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise RecordError(f"{where}: got {array.max()}, want ids; save the ids themselves")
    return array.astype(np.int64)


def _npy_file(path: Path) -> Any:
    return _npy(str(path), _bytes(path, MOST_BYTES))


def _npy(where: str, content: bytes) -> Any:
    """An array of numbers. An .npy of objects is a pickle, which is not opened."""
    if content[:6] != b"\x93NUMPY":
        raise RecordError(f"{where}: is no .npy file; save it with numpy.save")
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = header(stream)
    except Exception as error:  # whatever a parser of foreign words may raise
        raise RecordError(
            f"{where}: not readable as .npy ({plainly(str(error))}); save it again with numpy.save, as integers"
        ) from error
    if dtype.kind not in "iu":
        raise RecordError(f"{where}: got {plainly(str(dtype))}, want integers; save the ids themselves")
    size, held = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if min(shape, default=0) < 0 or size != held or len(shape) > 8:
        raise RecordError(
            f"{where}: got {held} bytes of {quoted(shape)} {dtype}, want {quoted(size)}; save it again, whole"
        )
    order: Literal["F", "C"] = "F" if is_fortran else "C"
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order=order)


def _bytes(path: Path, most: int) -> bytes:
    try:
        with open(path, "rb", opener=open_at_once) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise RecordError(f"{path}: got a pipe or a device, want a file; save the record to one")
            if found.st_size > most:
                raise RecordError(f"{path}: got {found.st_size} bytes, want at most {most}; record fewer requests")
            return stream.read()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RecordError(f"{path}: not readable ({why}); point to the record") from error


def _of_safetensors(path: Path) -> Iterator[Request]:
    try:
        header = read_header(path, path.name)
    except Damaged as error:
        raise RecordError(f"{path}: {error}") from error
    except OSError as error:
        raise RecordError(f"{path}: not readable ({error.strerror}); point to the record") from error
    found: dict[int, dict[str, Stored]] = {}
    for stored in header.tensors:
        if not (match := _TENSOR.fullmatch(stored.name)):
            raise RecordError(f"{path}: got tensor {plainly(stored.name)}, want {_WANT}")
        found.setdefault(int(match[2]), {})[match[1]] = stored
    content = _bytes(path, MOST_BYTES)
    for number, tensors in sorted(found.items()):
        where = f"{path}: request {number}"
        arrays = {name: _array(where, stored, content, header.data) for name, stored in tensors.items()}
        if not {"tokens", "routed_experts"} <= arrays.keys():
            raise RecordError(f"{where}: got {few(sorted(arrays))} alone, want {_WANT}")
        rank = arrays.get("rank")
        if rank is not None and rank.size != 1:
            raise RecordError(f"{where}: rank: got {rank.size} numbers, want one")
        yield _request(
            where,
            str(number),
            arrays["tokens"],
            arrays["routed_experts"],
            arrays.get("positions"),
            None if rank is None else int(rank.flatten()[0]),
        )


def _array(where: str, stored: Stored, content: bytes, data: int) -> Any:
    if stored.dtype not in INTEGERS:
        raise RecordError(f"{where}: {stored.name}: got {stored.dtype}, want integers; save the ids themselves")
    raw = content[data + stored.begin : data + stored.end]
    return np.frombuffer(raw, "<" + INTEGERS[stored.dtype]).reshape(stored.shape)


def _of_lines(path: Path) -> Iterator[Request]:
    content = _bytes(path, MOST_BYTES)
    for number, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        where = f"{path}: line {number + 1}"
        if len(line) > MOST_LINE:
            raise RecordError(f"{where}: got {len(line)} bytes, want at most {MOST_LINE}; save routed experts as .npy")
        try:
            said = parsed(line.decode(), where)
        except UnicodeDecodeError:
            raise RecordError(f"{where}: is not UTF-8; write JSON, one object a line") from None
        except CheckpointError as error:
            raise RecordError(str(error)) from error
        yield _of_response(where, str(number), said)


def _of_response(where: str, name: str, said: Mapping[str, Any]) -> Request:
    """A response of vLLM's or SGLang's, beside the token ids of its prompt."""
    info = said.get("meta_info")
    held = said if not isinstance(info, Mapping) or "routed_experts" in said else info
    prompt = _first(said, "prompt_token_ids", "input_ids")
    answer = _first(said, "token_ids", "output_ids")
    if prompt is None or answer is None or "routed_experts" not in held:
        raise RecordError(
            f"{where}: got {few(sorted(said))}, want prompt_token_ids or input_ids, token_ids or output_ids, and "
            "routed_experts, by itself or in meta_info"
        )
    tokens = np.concatenate([_listed(f"{where}: {key}", value, 1) for key, value in (prompt, answer)])
    routed, rank = held["routed_experts"], said.get("rank")
    is_text = isinstance(routed, str)
    ids = _decoded(where, routed, said) if is_text else _listed(f"{where}: routed_experts", routed, 3)
    if rank is not None and type(rank) is not int:
        raise RecordError(f"{where}: rank: got {quoted(rank)}, want an integer")
    positions = said.get("positions")
    if positions is not None:
        positions = _listed(f"{where}: positions", positions, 1)
    return _request(where, name, tokens, ids, positions, rank)


def _first(said: Mapping[str, Any], *names: str) -> tuple[str, Any] | None:
    return next(((name, said[name]) for name in names if said.get(name) is not None), None)


def _listed(where: str, values: Any, dims: int) -> Any:
    """Lists of integers as an array; no other objects, of which NumPy would make one of objects."""
    if not isinstance(values, list):
        raise RecordError(f"{where}: got {quoted(values)}, want a list of integers")
    if not values:
        return np.zeros((0,) * dims, np.int64)
    try:
        array = np.array(values)
    except (ValueError, OverflowError, RecursionError) as error:
        raise RecordError(f"{where}: got lists of different lengths, want [rows, layers, k] ({error})") from error
    return _integers(where, array, dims)


def _decoded(where: str, text: str, said: Mapping[str, Any]) -> Any:
    """base64 of an .npy file, as vLLM's server answers; or of int32, as SGLang does, whose shape must be beside it."""
    try:
        raw = base64.b64decode(text.encode(), validate=True)
    except ValueError as error:
        raise RecordError(f"{where}: routed_experts: not readable as base64 ({error})") from error
    if raw[:6] == b"\x93NUMPY":
        return _npy(f"{where}: routed_experts", raw)
    if len(raw) % 4:
        raise RecordError(f"{where}: routed_experts: got {len(raw)} bytes, want int32 or an .npy file in base64")
    flat, shape = np.frombuffer(raw, "<i4"), said.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise RecordError(f"{where}: shape: got {quoted(shape)}, want [layers, k] beside SGLang's routed_experts")
    layers, top_k = shape
    if flat.size % (layers * top_k):
        raise RecordError(
            f"{where}: routed_experts: got {flat.size} numbers, want a multiple of {layers} layers with {top_k} experts"
        )
    return flat.reshape(-1, layers, top_k)

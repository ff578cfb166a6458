"""Nested state in one file without pickle, flushed and hashed.

A state file is an uncompressed NPZ archive: the tensors and arrays, and the structure
around them as JSON in the array ``schema``. It is written with ordinary writes, so that
a full disk raises ``OSError`` (a memory-mapped file would end the process). Reading
makes values of the kinds that are listed in :func:`write_state`, and nothing else:
no name in a file is looked up or called, and no more is read than the file holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

__all__ = [
    "file_digest",
    "flush_to_disk",
    "one_line",
    "parse_json",
    "read_state",
    "write_state",
]


def write_state(path: Path, state: Any) -> None:  # noqa: ANN401
    """Writes nested state into a new file.

    Args:
        path: the file.
        state: mappings, lists and tuples of tensors, NumPy arrays, numbers, strings
            and ``None``, as state dicts hold them.

    Raises:
        TypeError: if ``state`` holds anything else.
        OSError: if the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    schema = json.dumps(_encode(state, arrays), separators=(",", ":"))
    with path.open("xb") as file:
        np.savez(file, schema=np.frombuffer(schema.encode(), np.uint8), **arrays)  # type: ignore[arg-type]


def read_state(path: Path, map_location: str | torch.device | None = None) -> Any:  # noqa: ANN401
    """Reads what :func:`write_state` wrote.

    Args:
        path: the file.
        map_location: device for the tensors. Default: ``None``, the one they were
            saved from.

    Raises:
        ValueError: if the file is missing, damaged or foreign.
    """
    try:
        arrays = _read_arrays(path)
        schema = parse_json(arrays.pop("schema").tobytes())
        state = _decode(schema, arrays, map_location)
        if arrays:
            raise ValueError(f"its schema does not name {', '.join(arrays)}")
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as state: {one_line(error)}"
        ) from error
    return state


def parse_json(text: bytes) -> Any:  # noqa: ANN401
    """Parses JSON in which no name occurs twice in an object.

    Raises:
        ValueError: if it is no such JSON.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_duplicates)


def one_line(error: BaseException) -> str:
    """The type and message of an error without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the list of names in a directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(state: Any, arrays: dict[str, np.ndarray]) -> Any:  # noqa: ANN401
    """State as JSON values; its tensors and arrays go to ``arrays``."""
    key = f"array_{len(arrays)}"
    node: dict[str, Any]
    if isinstance(state, Tensor):
        tensor = state.detach().cpu()
        node = {"tensor": key, "device": str(state.device)}
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type: its bits.
            tensor, node["bits_of"] = tensor.view(torch.int16), "bfloat16"
        arrays[key] = tensor.numpy()
        return node
    if isinstance(state, np.ndarray | np.generic):  # np.float64 is a float, too
        arrays[key] = np.asarray(state)
        if arrays[key].dtype.kind not in "biufc":
            raise TypeError(f"state: expected arrays of numbers, got {state.dtype}")
        return {"array" if isinstance(state, np.ndarray) else "scalar": key}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if isinstance(state, Mapping):
        pairs = [[_encode(k, arrays), _encode(v, arrays)] for k, v in state.items()]
        node = {"dict": pairs}
        if hasattr(state, "_metadata"):
            node["metadata"] = _encode(state._metadata, arrays)
        return node
    if isinstance(state, list | tuple):
        kind = "list" if isinstance(state, list) else "tuple"
        return {kind: [_encode(value, arrays) for value in state]}
    raise TypeError(
        "state: expected tensors, arrays, numbers, strings, None, and lists, tuples "
        f"and mappings of such, got {type(state).__name__}"
    )


def _decode(
    node: Any,  # noqa: ANN401
    arrays: dict[str, np.ndarray],
    device: str | torch.device | None,
) -> Any:  # noqa: ANN401
    """Makes again what :func:`_encode` took apart; uses each array once."""
    match node:
        case None | bool() | int() | float() | str():
            return node
        case {"list": list(items)}:
            return [_decode(item, arrays, device) for item in items]
        case {"tuple": list(items)}:
            return tuple(_decode(item, arrays, device) for item in items)
        case {"dict": list(items), **rest}:
            pairs = [[_decode(part, arrays, device) for part in pair] for pair in items]
            mapping = _without_duplicates(pairs)
            if "metadata" in rest:
                mapping = OrderedDict(mapping)
                mapping._metadata = _decode(rest["metadata"], arrays, device)  # type: ignore[attr-defined]
            return mapping
        case {"tensor": str(key), "device": str(saved), **rest}:
            tensor = torch.from_numpy(arrays.pop(key))
            if rest == {"bits_of": "bfloat16"}:
                tensor = tensor.view(torch.bfloat16)
            if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", saved):
                raise ValueError(f"expected a device, got {saved!r}")
            return tensor.to(saved if device is None else device)
        case {"array": str(key)}:
            return arrays.pop(key)
        case {"scalar": str(key)}:
            return arrays.pop(key)[()]
    raise ValueError(f"expected a value, got {str(node)[:80]!r}")


def _without_duplicates(pairs: list[Any]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The members of an archive that hold what they say, and no more than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        stored = all(
            member.compress_type == zipfile.ZIP_STORED
            and member.compress_size == member.file_size
            for member in members
        )
        if not stored or sum(member.file_size for member in members) > size:
            raise ValueError(f"its members are compressed or exceed its {size} bytes")
        pairs = [(m.filename.removesuffix(".npy"), m) for m in members]
        return {
            name: _read_array(archive, member)
            for name, member in _without_duplicates(pairs).items()
        }


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{member.filename} has format {version}")
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
        expected = math.prod(shape) * dtype.itemsize
        got = member.file_size - file.tell()
        if dtype.kind not in "biufc" or expected != got:
            raise ValueError(
                f"{member.filename}: expected {expected} bytes of {dtype}, got {got}"
            )
        # A copy, since what is read from bytes cannot be written to.
        values = np.frombuffer(bytearray(file.read()), dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")

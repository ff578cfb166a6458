"""Nested state in two files, without pickle: ``state.json`` and ``tensors.npz``.

The JSON file holds the structure and the plain values, as TorchRL's own state-dict
adapter writes it; the NPZ file, an uncompressed ZIP archive of NumPy arrays, holds the
tensors. Both are written with ordinary writes, so that a full disk raises ``OSError``
(a memory-mapped file would end the process), and read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.checkpoint._checkpoint import (
    _decode_state_dict_value,
    _encode_state_dict_value,
)

__all__ = [
    "file_digest",
    "flush_to_disk",
    "read_state",
    "read_tensors",
    "write_json",
    "write_state",
    "write_tensors",
]

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.npz"

# NumPy has no such types: their bits are stored as integers of the same size.
_BITS = {torch.bfloat16: torch.int16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _BITS}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into a new NPZ file.

    Args:
        path: the file to write.
        tensors: by name, of any shape, on any device.

    Raises:
        OSError: if the file cannot be written; what there is of it is the caller's
            to remove.
    """
    arrays: dict[str, Any] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if tensor.dtype in _BITS:
            name = f"{name}|{str(tensor.dtype).removeprefix('torch.')}"
            tensor = tensor.view(_BITS[tensor.dtype])
        arrays[name] = tensor.numpy()
    with path.open("xb") as file:
        np.savez(file, **arrays)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what :func:`write_tensors` wrote.

    Raises:
        ValueError: if the file is not such a file, is damaged, or holds a pickle,
            which is not executed.
    """
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for stored in arrays.files:
                tensor = torch.from_numpy(arrays[stored])
                name, _, dtype = stored.rpartition("|")
                if dtype in _DTYPES:
                    tensors[name] = tensor.view(_DTYPES[dtype])
                else:
                    tensors[stored] = tensor
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as tensors: {error}") from error
    return tensors


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Writes a value as JSON into a new file."""
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, separators=(",", ":"))
        file.write("\n")


def write_state(directory: Path, state: Any) -> None:  # noqa: ANN401
    """Writes nested state into a directory, made if it does not exist.

    Args:
        directory: where the two files go.
        state: mappings, lists and tuples of tensors, arrays, numbers, strings and
            ``None``, as state dicts hold them.

    Raises:
        TypeError: if it holds anything else.
        OSError: if a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    schema = _encode_state_dict_value(state, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / TENSORS_FILE, tensors)
    write_json(directory / STATE_FILE, schema)


def read_state(directory: Path, map_location: object = None) -> Any:  # noqa: ANN401
    """Reads what :func:`write_state` wrote.

    Args:
        directory: where the two files are.
        map_location: device for the tensors. Default: ``None``, the one they were
            saved from.

    Raises:
        ValueError: if a file is damaged, foreign, or holds a pickle.
        OSError: if a file is missing or unreadable.
    """
    with (directory / STATE_FILE).open(encoding="utf-8") as file:
        schema = json.load(file)
    return _decode_state_dict_value(
        schema, read_tensors(directory / TENSORS_FILE), map_location
    )


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

"""Nested state in one file without pickle, flushed and hashed.

A state file is an uncompressed NPZ archive: the tensors as NumPy arrays, and the
structure around them as JSON in the array ``schema``. It is written with ordinary
writes, so that a full disk raises ``OSError`` (a memory-mapped file would end the
process), and read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alm_torchrl.compat import decode_state, encode_state

__all__ = ["file_digest", "flush_to_disk", "read_state", "write_state"]

# NumPy has no bfloat16: its bits are stored as integers, under a name that says so.
_BFLOAT16 = "|bfloat16"


def write_state(path: Path, state: Any) -> None:  # noqa: ANN401
    """Writes nested state into a new file.

    Args:
        path: the file.
        state: mappings, lists and tuples of tensors, arrays, numbers, strings and
            ``None``, as state dicts hold them.

    Raises:
        TypeError: if ``state`` holds anything else.
        OSError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    schema = json.dumps(encode_state(state, tensors), separators=(",", ":"))
    arrays = {"schema": np.frombuffer(schema.encode(), np.uint8)}
    for name, tensor in tensors.items():
        tensor = tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            arrays[name + _BFLOAT16] = tensor.view(torch.int16).numpy()
        else:
            arrays[name] = tensor.numpy()
    with path.open("xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_state(path: Path, map_location: object = None) -> Any:  # noqa: ANN401
    """Reads what :func:`write_state` wrote.

    Args:
        path: the file.
        map_location: device for the tensors. Default: ``None``, the one they were
            saved from.

    Raises:
        ValueError: if the file is missing, damaged, foreign, or holds a pickle.
    """
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            schema = json.loads(arrays["schema"].tobytes())
            for stored in arrays.files:
                name = stored.removesuffix(_BFLOAT16)
                tensor = torch.from_numpy(arrays[stored])
                tensors[name] = (
                    tensor if name == stored else tensor.view(torch.bfloat16)
                )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as state: {error}") from error
    return decode_state(schema, tensors, map_location)


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

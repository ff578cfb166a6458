"""Ways to damage a checkpoint, most of them with digests that agree again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from alm_torchrl.training.files import read_state, write_state


class Poison:
    """Makes the folder ``executed`` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def state_file(path, component):
    """The file of a component's state, or of a replay buffer's index."""
    (folder,) = path.glob(f"components/*-{component}")
    name = "replay.npz" if component == "replay_buffer" else "state.npz"
    return folder / name


def sign(path, manifest):
    """Gives the manifest a digest that agrees with its content."""
    section = manifest["alm_torchrl"]
    section.pop("manifest_sha256", None)
    text = json.dumps(manifest, sort_keys=True)
    section["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def sign_files(path):
    """Has the manifest say what the files are now."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["alm_torchrl"]["files"] = {
        file.relative_to(path).as_posix(): [
            file.stat().st_size,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        ]
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    sign(path, manifest)


def manifest(edit):
    """Edits the manifest, which agrees with itself afterwards."""

    def tamper(path):
        content = json.loads((path / "manifest.json").read_text())
        edit(content)
        sign(path, content)

    return tamper


def record(name, **changes):
    """Changes what the manifest says of a component."""
    return manifest(lambda content: content["components"][name].update(changes))


def section(**changes):
    """Changes the manifest's own section."""
    return manifest(lambda content: content["alm_torchrl"].update(changes))


def manifest_text(text):
    """Replaces the manifest."""
    return lambda path: (path / "manifest.json").write_text(text)


def state(component, edit):
    """Edits the state of a component; digests agree."""

    def tamper(path):
        file = state_file(path, component)
        content = read_state(file)
        content = edit(content) or content
        file.unlink()
        write_state(file, content)
        sign_files(path)

    return tamper


def put(*place, value):
    """Sets a value deep in nested state; of a tuple, makes a new one."""

    def edit(content):
        at, *rest = place
        inner = value
        if rest:
            inner = put(*rest, value=value)(content[at])
        elif callable(value):
            inner = value(content[at])
        if isinstance(content, tuple):
            return (*content[:at], inner, *content[at + 1 :])
        content[at] = inner
        return content

    return edit


def drop(*place):
    """Removes a value deep in nested state."""

    def edit(content):
        for step in place[:-1]:
            content = content[step]
        del content[place[-1]]

    return edit


def segment(number, edit):
    """Edits the rows of a segment; digests agree."""

    def tamper(path):
        file = sorted(path.glob("components/*/rows-*.npz"))[number]
        content = read_state(file)
        edit(content)
        file.unlink()
        write_state(file, content)
        sign_files(path)

    return tamper


def archive(make, component="trainer_state"):
    """Replaces a state file by what ``make`` gives for its members; digests agree."""

    def tamper(path):
        file = state_file(path, component)
        with np.load(file) as members:
            arrays = {name: members[name] for name in members.files}
        file.write_bytes(make(arrays))
        sign_files(path)

    return tamper


def zipped(members, compression=zipfile.ZIP_STORED):
    """An archive of named contents."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name, content in members:
            target.writestr(name, content)
    return stream.getvalue()


def npy(array, **header):
    """A NumPy file, of an array or with a header that says something else."""
    stream = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(array.tobytes())
    else:
        np.save(stream, array)
    return stream.getvalue()


def schema(content, **arrays):
    """A state file with this schema."""
    text = content if isinstance(content, str) else json.dumps(content)
    members = {"schema": np.frombuffer(text.encode(), np.uint8), **arrays}
    return archive(
        lambda _: zipped([(f"{name}.npy", npy(a)) for name, a in members.items()])
    )


def elsewhere(relative):
    """Moves a file or folder out of the checkpoint and leaves a link to it."""

    def tamper(path):
        (place,) = path.glob(relative)
        outside = path.parent / f"{path.name}-outside"
        place.rename(outside)
        place.symlink_to(outside)

    return tamper


def in_place(relative, act):
    """Does something to a file."""

    def tamper(path):
        (place,) = path.glob(relative)
        act(place)

    return tamper


def as_dtype(dtype):
    """Converts a tensor."""
    return lambda tensor: tensor.to(dtype)


def longer(tensor):
    """A tensor with a row more."""
    return torch.cat([tensor, tensor[:1]])


def fifo(place):
    """Replaces a file by a pipe, which nobody writes to."""
    place.unlink()
    os.mkfifo(place)


def folder(place):
    """Replaces a file by a folder."""
    place.unlink()
    place.mkdir()


def add(relative):
    """Adds a file that no manifest knows."""

    def tamper(path):
        (place,) = path.glob(str(Path(relative).parent))
        (place / Path(relative).name).write_text("new")

    return tamper

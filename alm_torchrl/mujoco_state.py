"""The state of a MuJoCo simulation, exact to the last bit.

The state that MuJoCo names (``mjSTATE_INTEGRATION``) fixes what the simulator does
next, but rewards and observations also read derived quantities such as ``xpos`` and
``cfrc_ext``, which after a step are still those from before its last integration. To
compute them anew would change them. So every array of ``MjData`` whose size the model
determines is kept as well. Contacts and constraints are not: each step makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["load_simulator_state", "simulator_state"]

# Parts of mjSTATE_INTEGRATION: they need no second copy.
_INTEGRATION = (
    *("qpos", "qvel", "act", "history", "plastic", "plugin_state", "qacc_warmstart"),
    *("ctrl", "qfrc_applied", "xfrc_applied", "eq_active", "mocap_pos", "mocap_quat"),
    "userdata",
)


def simulator_state(data: Any) -> dict[str, Any]:  # noqa: ANN401
    """Takes the state of a ``mujoco.MjData``.

    Args:
        data: The simulation, of any model.

    Returns:
        Its state, and the parameters of its model to recognise it by.

    Raises:
        ValueError: If the simulation has state that cannot be read: plugins, or
            bodies that may fall asleep; or if its model has no joints.
    """
    import mujoco

    model = data.model
    if not model.nq:
        raise ValueError("its model has no joints")
    if model.nplugin:
        raise ValueError("its model uses plugins, which may keep state of their own")
    sleep = getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0)
    if model.opt.enableflags & int(sleep):
        raise ValueError("its bodies may fall asleep, and which do cannot be read")
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, integration, kind)
    return {
        "integration": integration,
        "derived": _pack(_derived(data)),
        "model": _pack(_parameters(model)),
    }


def load_simulator_state(data: Any, state: dict[str, Any]) -> None:  # noqa: ANN401
    """Puts a simulation into a state; its next step is the one that came next.

    Args:
        data: The ``mujoco.MjData`` to change, of the same model.
        state: What :func:`simulator_state` returned.

    Raises:
        ValueError: If the model is another one, or ``state`` was taken with a
            version of MuJoCo that keeps other arrays.
    """
    import mujoco

    model = data.model
    parameters = _parameters(model)
    differs = _mismatch(_pack(parameters)["layout"], state["model"]["layout"])
    if differs is None:
        saved = _unpack(state["model"])
        for name, value in parameters.items():
            # The last bits may depend on the machine that compiled the model.
            if not np.allclose(value, saved[name], 1e-9, 1e-12, equal_nan=True):
                differs = f"{name} has other values"
                break
    if differs is not None:
        raise ValueError(f"its MuJoCo model is another one: {differs}")
    derived = _derived(data)
    differs = _mismatch(_pack(derived)["layout"], state["derived"]["layout"])
    if differs is not None:
        raise ValueError(f"its MuJoCo version is another one: {differs}")
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, np.asarray(state["integration"]), kind)
    saved = _unpack(state["derived"])
    for name, value in derived.items():
        value[...] = saved[name]


def _derived(data: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
    """The arrays in ``MjData``'s own buffer, which starts with ``qpos``.

    What lies elsewhere is scratch memory: its arrays come and go with contacts.
    """
    start = data.qpos.__array_interface__["data"][0]
    return {
        name: value
        for name, value in _arrays(data)
        if name not in _INTEGRATION
        and 0 <= value.__array_interface__["data"][0] - start < data.nbuffer
    }


def _parameters(model: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
    """The physical constants of a model and the numeric options of its solver."""
    parameters = {
        name: value for name, value in _arrays(model) if value.dtype == np.float64
    }
    for name in sorted(dir(model.opt)):
        value = getattr(model.opt, name)
        if not name.startswith("_") and isinstance(value, int | float | np.ndarray):
            parameters[f"opt.{name}"] = np.array(value, np.float64)
    return parameters


def _arrays(owner: Any) -> Iterator[tuple[str, np.ndarray]]:  # noqa: ANN401
    for name in sorted(vars(type(owner))):
        if not name.startswith("_"):
            value = getattr(owner, name)
            if isinstance(value, np.ndarray) and value.size:
                yield name, value


def _pack(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Many small arrays as one of bytes, sorted by name, and where to find them."""
    arrays = dict(sorted(arrays.items()))
    layout = {name: [a.dtype.str, list(a.shape)] for name, a in arrays.items()}
    parts = [np.frombuffer(array.tobytes(), np.uint8) for array in arrays.values()]
    return {"layout": layout, "bytes": np.concatenate(parts)}


def _unpack(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays, start = {}, 0
    raw = np.ascontiguousarray(packed["bytes"]).tobytes()
    for name, (dtype, shape) in sorted(packed["layout"].items()):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(raw, dtype, count, start).reshape(shape)
        start += arrays[name].nbytes
    return arrays


def _mismatch(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    for name in sorted({*here, *there}):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours != [theirs[0], list(theirs[1])]:
            return f"{name} is {_array(ours)} here and {_array(theirs)} in the state"
    return None


def _array(entry: list[Any] | None) -> str:
    return "missing" if entry is None else f"{np.dtype(entry[0])} {list(entry[1])}"

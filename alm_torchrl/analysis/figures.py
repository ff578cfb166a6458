"""Figures of what :mod:`alm_torchrl.analysis` returns.

Each ``plot_*`` draws one result under ``title`` and writes the figure to ``output``, in
the format of its ending. It returns ``output``. An ``ImportError`` says that Matplotlib
is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase

from alm_torchrl.analysis.bias import normalised_bias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "QUANTILES",
    "TERMS",
    "estimate_labels",
    "panels",
    "plot_bias",
    "plot_history",
    "plot_reliability",
    "plot_rollout",
    "plot_terms",
    "save",
    "steps_axis",
]

QUANTILES = {"q10": 0.1, "median": 0.5, "q90": 0.9}
"""Quantiles shown of rollouts from several starts."""

TERMS = {
    "kl": "KL, model to encoder (nats)",
    "model_reward": "reward in the model loss",
    "terminal_value": "terminal value in the model loss",
    "loss_model": "model loss (Eq. 7)",
    "loss_reward": "reward loss (Eq. 11)",
    "loss_classifier": "classifier loss (Eq. 9)",
    "classifier_accuracy": "classifier accuracy",
    "loss_qvalue": "critic loss (Eq. 10)",
    "imagined_reward": "imagined reward",
    "imagined_log_ratio": "imagined log ratio (nats)",
    "imagined_value": "imagined value",
    "loss_actor": "actor loss (Eq. 8)",
}
"""Labels of the objective's terms, by the name under which training logs them."""

_NORMALISED = "(estimate - return) / |mean return|"
_WIDE = (9.0, 3.8)
_DIMENSIONS = 3
_SMALL: dict[str, Any] = {"frameon": False, "fontsize": 9}
_ABOVE: dict[str, Any] = {
    **_SMALL,
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "columnspacing": 1.0,
}


def estimate_labels(found: TensorDictBase) -> dict[str, str]:
    """Labels of the estimates in the result of ``bound_bias`` or ``bias_summary``."""
    if "bound" in found:
        return {"bound": "bound", "qvalue": "min Q(z, a)"}
    return {"qvalue": "Q(s, a)"}


def plot_bias(pairs: TensorDictBase, title: str, output: Path) -> Path:
    """Draws the pairs of ``bound_bias``: estimates against returns, and their bias."""
    figure, (left, right) = panels(1, 2, _WIDE, title)
    returns, labels = pairs["monte_carlo"], estimate_labels(pairs)
    biases = {name: normalised_bias(pairs)[name, "overall"] for name in labels}
    # Not finite if all returns are zero.
    finite = torch.cat([bias[bias.isfinite()] for bias in biases.values()])
    ends = (finite.min().item(), finite.max().item()) if len(finite) else (-1.0, 1.0)
    edges = np.linspace(*ends, 41).tolist()
    for color, (name, bias) in zip(("C0", "C1"), biases.items(), strict=False):
        left.plot(returns, pairs[name], ".", markersize=3, alpha=0.5, color=color)
        left.plot([], [], "o", color=color, label=labels[name])
        mean, std = bias.mean().item(), bias.std(correction=0).item()
        label = f"{labels[name]}: {mean:.2f} $\\pm$ {std:.2f}"
        shown = bias[bias.isfinite()].numpy()
        right.hist(shown, edges, alpha=0.5, color=color, label=label)
        if len(finite):
            right.axvline(mean, color=color, linewidth=1.5)
    exact = [returns.min().item(), returns.max().item()]
    left.plot(exact, exact, "k--", linewidth=1, label="exact")
    left.set(xlabel="discounted Monte-Carlo return", ylabel="estimate")
    right.set(xlabel=_NORMALISED, ylabel=f"pairs, of {len(pairs):,}")
    right.locator_params(axis="x", nbins=6)
    left.legend(ncols=3, **_ABOVE)
    right.legend(ncols=2, **_ABOVE)
    return save(figure, output)


def plot_history(
    summaries: Mapping[int, TensorDictBase], title: str, output: Path
) -> Path:
    """Draws results of ``bias_summary`` by training step, ascending (Fig. 4, 8)."""
    figure, axes = panels(1, 2, (9.0, 3.6), title)
    labels = estimate_labels(next(iter(summaries.values())))
    for panel, statistic in zip(axes, ("mean", "std"), strict=True):
        for name, label in labels.items():
            values = [s[name, "overall", statistic].item() for s in summaries.values()]
            panel.plot(list(summaries), values, marker="o", markersize=4, label=label)
        steps_axis(panel, "training steps")
    axes[0].axhline(0, color="k", linewidth=1, linestyle="--")
    axes[0].set_ylabel(f"mean of\n{_NORMALISED}")
    axes[0].legend(**_SMALL)
    axes[1].set_ylabel(f"standard deviation of\n{_NORMALISED}")
    axes[1].set_ylim(bottom=0)
    return save(figure, output)


def plot_rollout(rollout: TensorDictBase, title: str, output: Path) -> Path:
    """Draws the result of ``latent_rollout`` (Fig. 7).

    Left: the middle start, in the dimensions that vary most. Right: errors of all.
    """
    figure, (left, right) = panels(1, 2, _WIDE, title)
    shown = rollout[len(rollout) // 2]
    steps = np.arange(len(shown))
    order = shown["latent"].var(0, correction=0).argsort(descending=True)
    for index, dim in enumerate(order[:_DIMENSIONS].tolist()):
        color = f"C{index}"
        encoded, predicted = (shown[name][:, dim] for name in ("latent", "predicted"))
        left.plot(steps, encoded, color=color, label=f"encoded {dim}")
        left.plot(steps, predicted, "--", color=color, label=f"predicted {dim}")
    left.set_ylabel(f"latent, from step {shown['step'][0].item()} of the episode")
    error = rollout["normalised_error"]
    low, median, high = (error.quantile(q, 0) for q in QUANTILES.values())
    right.plot(steps, median, color="C3", label=f"median of {len(rollout)} starts")
    band: dict[str, Any] = {"color": "C3", "alpha": 0.2, "linewidth": 0}
    right.fill_between(steps, low, high, label="10% to 90%", **band)
    right.axhline(1, color="k", linestyle="--", linewidth=1, label="constant guess")
    right.set_ylabel("RMS error / deviation of the latents")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.legend(ncols=3, **_ABOVE)
        steps_axis(panel, "predicted steps, open loop")
    return save(figure, output)


def plot_reliability(statistics: TensorDictBase, title: str, output: Path) -> Path:
    """Draws the classifier's reliability from the result of ``latent_statistics``."""
    figure, (left, right) = panels(1, 2, _WIDE, title)
    table = statistics["reliability"].cpu()
    points = table[table["count"] > 0]
    error = statistics["calibration_error"].item()
    left.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    label = f"classifier, error {error:.3f}"
    left.plot(points["confidence"], points["frequency"], marker="o", label=label)
    left.set(ylabel="share of real latents", ylim=(-0.02, 1.02))
    left.legend(**_SMALL)
    width = 1 / len(table)
    middles = (np.arange(len(table)) + 0.5) * width
    right.bar(middles, (table["count"] / table["count"].sum()).numpy(), width * 0.9)
    right.set_ylabel("share of latents, half of them real")
    accuracy = statistics["classifier_accuracy"].item()
    right.set_title(f"accuracy {accuracy:.2f}", fontsize=10)
    for panel in (left, right):
        panel.set(xlabel='probability of "real"', xlim=(-0.02, 1.02))
    return save(figure, output)


def plot_terms(logged: Mapping[str, TensorDictBase], title: str, output: Path) -> Path:
    """Draws the logged :data:`TERMS`: ``value`` over ``step``, the training step."""
    shown = [name for name in TERMS if name in logged]
    rows = -(-len(shown) // 4)
    figure, axes = panels(rows, 4, (12.0, 2.4 * rows + 0.4), title)
    for panel, name in zip(axes, shown, strict=False):
        curve = logged[name]
        panel.plot(curve["step"], curve["value"], linewidth=1.2)
        panel.set_title(TERMS[name], fontsize=10)
        steps_axis(panel, "training steps", 4)
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    return save(figure, output)


def panels(
    rows: int, columns: int, size: tuple[float, float], title: str = ""
) -> tuple[Figure, list[Axes]]:
    """An empty figure, its size in inches, and its panels, row by row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need Matplotlib: pip install 'alm_torchrl[cli]'"
        ) from error
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def steps_axis(panel: Axes, label: str, bins: int = 6) -> None:
    """Gives a panel a horizontal axis of whole steps, at most ``bins`` of them told."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panel.set_xlabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def save(figure: Figure, output: Path) -> Path:
    """Writes a figure, and makes its folder if it is missing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output

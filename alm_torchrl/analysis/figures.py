"""The diagnostics as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from alm_torchrl.analysis.bias import normalised_bias
from alm_torchrl.analysis.logged import TERMS, Logged

__all__ = [
    "estimate_labels",
    "plot_bias",
    "plot_history",
    "plot_reliability",
    "plot_rollout",
    "plot_terms",
]

NORMALISED = "(estimate - return) / |mean return|"
QUANTILES = {"q10": 0.1, "median": 0.5, "q90": 0.9}
"""What is shown of the rollouts from several starts."""

_DIMENSIONS = 3


def estimate_labels(found: TensorDictBase) -> dict[str, str]:
    """The estimates in pairs, or in their summary, and what to call them.

    Args:
        found: what :func:`~alm_torchrl.diagnostics.bound_bias` or
            :func:`~alm_torchrl.diagnostics.bias_summary` returned.

    Returns:
        dict: labels by entry.
    """
    if "bound" in found:
        return {"bound": "bound", "qvalue": "min Q(z, a)"}
    return {"qvalue": "Q(s, a)"}


def plot_bias(pairs: TensorDictBase, title: str, output: Path) -> Path:
    """Draws estimates against returns, and how the normalised bias is distributed.

    Args:
        pairs: ``[N]``, what :func:`~alm_torchrl.diagnostics.bound_bias` returned.
        title: of the picture.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    figure, (left, right) = _panels(1, 2, (9.0, 3.8), title)
    returns = pairs["monte_carlo"]
    biases = normalised_bias(pairs)
    labels = estimate_labels(pairs)
    spread = torch.cat([biases[name]["overall"] for name in labels])
    # Not finite where all returns are zero: then there is nothing to normalise by.
    spread = spread[spread.isfinite()]
    ends = (spread.min().item(), spread.max().item()) if len(spread) else (-1.0, 1.0)
    edges = np.linspace(*ends, 41)
    for index, (name, text) in enumerate(labels.items()):
        color = f"C{index}"
        left.plot(returns, pairs[name], ".", markersize=3, alpha=0.5, color=color)
        bias = biases[name]["overall"]
        mean, std = bias.mean().item(), bias.std(correction=0).item()
        label = f"{text}: {mean:.2f} $\\pm$ {std:.2f}"
        right.hist(
            bias[bias.isfinite()].numpy(), edges, alpha=0.5, color=color, label=label
        )
        if len(spread):
            right.axvline(mean, color=color, linewidth=1.5)
        left.plot([], [], "o", color=color, label=text)
    exact = [returns.min().item(), returns.max().item()]
    left.plot(exact, exact, "k--", linewidth=1, label="exact")
    left.set_xlabel("discounted Monte-Carlo return")
    left.set_ylabel("estimate")
    right.set_xlabel(NORMALISED)
    right.locator_params(axis="x", nbins=6)
    right.set_ylabel(f"pairs, of {len(pairs):,}")
    _legend_above(left, 3)
    _legend_above(right, 2)
    return _save(figure, output)


def plot_history(
    summaries: Mapping[int, TensorDictBase], title: str, output: Path
) -> Path:
    """Draws mean and deviation of the normalised bias over training (Fig. 4, 8).

    Args:
        summaries: by training step, ascending, what
            :func:`~alm_torchrl.diagnostics.bias_summary` returned.
        title: of the picture.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    figure, panels = _panels(1, 2, (9.0, 3.6), title)
    labels = estimate_labels(next(iter(summaries.values())))
    for panel, what in zip(panels, ("mean", "std"), strict=True):
        for name, text in labels.items():
            values = [s[name, "overall", what].item() for s in summaries.values()]
            panel.plot(list(summaries), values, marker="o", markersize=4, label=text)
        _steps_axis(panel, "training steps")
    panels[0].axhline(0, color="k", linewidth=1, linestyle="--")
    panels[0].set_ylabel(f"mean of\n{NORMALISED}")
    panels[1].set_ylabel(f"standard deviation of\n{NORMALISED}")
    panels[1].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=9)
    return _save(figure, output)


def plot_rollout(rollout: TensorDictBase, title: str, output: Path) -> Path:
    """Draws an open-loop rollout next to the encoded truth, and the errors (Fig. 7).

    The dimensions shown are those that vary most along the rollout.

    Args:
        rollout: ``[S, T + 1]``, what :func:`~alm_torchrl.diagnostics.latent_rollout`
            returned; the one from the middle start is shown.
        title: of the picture.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    figure, (left, right) = _panels(1, 2, (9.0, 3.8), title)
    shown = rollout[len(rollout) // 2]
    steps = np.arange(len(shown))
    spread = shown["latent"].var(0, correction=0)
    for index, dim in enumerate(spread.argsort(descending=True)[:_DIMENSIONS].tolist()):
        color = f"C{index}"
        left.plot(steps, shown["latent"][:, dim], color=color, label=f"encoded {dim}")
        left.plot(
            *(steps, shown["predicted"][:, dim], "--"),
            color=color,
            label=f"predicted {dim}",
        )
    left.set_ylabel(f"latent, from step {shown['step'][0].item()} of the episode")
    _legend_above(left, 3)
    error = rollout["normalised_error"]
    low, median, high = (error.quantile(q, 0) for q in QUANTILES.values())
    label = f"median of {len(rollout)} starts"
    right.plot(steps, median, color="C3", label=label)
    band = "10% to 90%"
    right.fill_between(steps, low, high, color="C3", alpha=0.2, linewidth=0, label=band)
    right.axhline(1, color="k", linestyle="--", linewidth=1, label="constant guess")
    right.set_ylabel("RMS error / deviation of the latents")
    right.set_ylim(bottom=0)
    _legend_above(right, 3)
    for panel in (left, right):
        _steps_axis(panel, "predicted steps, open loop")
    return _save(figure, output)


def plot_reliability(statistics: TensorDictBase, title: str, output: Path) -> Path:
    """Draws how often latents were real, by the classifier's probability.

    Args:
        statistics: with a classifier, what
            :func:`~alm_torchrl.diagnostics.latent_statistics` returned.
        title: of the picture.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    figure, (left, right) = _panels(1, 2, (9.0, 3.8), title)
    table = statistics["reliability"].cpu()
    filled = table["count"] > 0
    left.plot([0, 1], [0, 1], "k--", linewidth=1, label="calibrated")
    left.plot(
        table["confidence"][filled],
        table["frequency"][filled],
        marker="o",
        label=f"classifier, error {statistics['calibration_error'].item():.3f}",
    )
    left.set_ylabel("share of real latents")
    left.set_ylim(-0.02, 1.02)
    left.legend(frameon=False, fontsize=9)
    width = 1 / len(table)
    middles = (np.arange(len(table)) + 0.5) * width
    share = (table["count"] / table["count"].sum()).numpy()
    right.bar(middles, share, width * 0.9)
    right.set_ylabel("share of latents, half of them real")
    accuracy = statistics["classifier_accuracy"].item()
    right.set_title(f"accuracy {accuracy:.2f}", fontsize=10)
    for panel in (left, right):
        panel.set_xlabel('probability of "real"')
        panel.set_xlim(-0.02, 1.02)
    return _save(figure, output)


def plot_terms(
    logged: Mapping[str, Logged], warmup_steps: int, title: str, output: Path
) -> Path:
    """Draws the terms of the objective over training, those that were logged.

    Args:
        logged: what :func:`~alm_torchrl.analysis.logged.read_logged` returned.
        warmup_steps: environment steps before the first training step.
        title: of the picture.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    shown = [name for name in TERMS if name in logged]
    rows = -(-len(shown) // 4)
    figure, panels = _panels(rows, 4, (12.0, 2.4 * rows + 0.4), title)
    for panel, name in zip(panels, shown, strict=False):
        steps = logged[name].steps - warmup_steps
        panel.plot(steps, logged[name].values, linewidth=1.2)
        panel.set_title(TERMS[name], fontsize=10)
        _steps_axis(panel, "training steps", 4)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    return _save(figure, output)


def _panels(
    rows: int, columns: int, size: tuple[float, float], title: str
) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need Matplotlib: pip install 'alm_torchrl[cli]'"
        ) from error
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    return figure, panels


def _steps_axis(panel: Any, label: str, bins: int = 6) -> None:  # noqa: ANN401
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panel.set_xlabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _legend_above(panel: Any, columns: int) -> None:  # noqa: ANN401
    """Puts the legend where it hides nothing."""
    panel.legend(
        frameon=False,
        fontsize=9,
        ncols=columns,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.0,
    )


def _save(figure: Any, output: Path) -> Path:  # noqa: ANN401
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output

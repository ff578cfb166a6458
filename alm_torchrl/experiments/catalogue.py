"""The paper's experiments as data: what to train on which tasks, and what came out.

Each :class:`Experiment` is a table or figure of Ghugare et al. (ICLR 2023). A
:class:`Scale` says how much of it to do: which tasks, seeds, steps and networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from alm_torchrl.runs.settings import TrainConfig, preset_config

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "Experiment",
    "Planned",
    "Scale",
    "ScaleName",
    "Variant",
    "plan",
]

Kind = Literal["curves", "bias", "rollout"]
ScaleName = Literal["smoke", "small", "paper"]


@dataclass(frozen=True)
class Variant:
    """One line of a figure: a name and the settings that make it.

    Example:
        >>> ALM.label, Variant("short", "ALM(1)", {"horizon": 1}).changes
        ('ALM(3)', {'horizon': 1})
    """

    name: str
    """Used in file names."""
    label: str
    """Used in legends and tables."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`~alm_torchrl.runs.settings.TrainConfig` that differ."""


ALM = Variant("alm", "ALM(3)")
SAC = Variant("sac", "SAC", {"agent": "sac"})
TD3 = Variant("td3", "TD3 (ours)", {"agent": "td3"})
REDQ = Variant("redq", "REDQ", {"agent": "redq"})
NO_KL = Variant("alm-no-kl", "no KL", {"kl_coef": 0.0})

MUJOCO = ("Humanoid-v5", "Ant-v5", "HalfCheetah-v5", "Walker2d-v5", "Hopper-v5")
TRUNCATED = ("T-Humanoid-v5", "T-Ant-v5", *MUJOCO[2:])


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, as runs to make and something to draw.

    Example:
        >>> one = EXPERIMENTS["table1"]
        >>> one.source, one.steps, one.tasks[0]
        ('Table 1', 200000, 'T-Humanoid-v5')
    """

    name: str
    """What ``alm-torchrl reproduce`` calls it."""
    source: str
    """Table or figure of the paper."""
    question: str
    """What it compares."""
    published: str
    """What the paper found."""
    variants: tuple[Variant, ...]
    """The lines of the figure."""
    tasks: tuple[str, ...] = TRUNCATED
    """Tasks at paper scale; Gymnasium's v5 for the paper's v2."""
    steps: int = 300_000
    """Training steps at paper scale."""
    kind: Kind = "curves"
    """Learning curves; or bias, or latent rollouts, of the trained agents."""


def _coefficient(value: float) -> Variant:
    return Variant(f"alm-c{value:g}", f"c = {value:g}", {"classifier_coef": value})


def _horizon(value: int) -> Variant:
    return Variant(f"alm-k{value}", f"ALM({value})", {"horizon": value})


def _noise(value: float) -> Variant:
    return Variant(f"alm-noise{value:g}", f"noise {value:g}", {"dynamics_noise": value})


_LISTED = (
    Experiment(
        "table1",
        "Table 1",
        "return after 200,000 training steps",
        "T-Humanoid 5306+-437, T-Ant 4887+-1027, HalfCheetah 10789+-366, Walker2d "
        "3006+-1183, Hopper 2546+-1074",
        (ALM,),
        steps=200_000,
    ),
    Experiment(
        "table5",
        "Table 5",
        "ALM-ENT: stochastic actor with SAC's entropy bonus",
        "T-Humanoid 4747+-900, T-Ant 4921+-128 after 200,000 steps",
        (ALM, Variant("alm-ent", "ALM-ENT(3)", {"entropy": True})),
        tasks=("T-Humanoid-v5", "T-Ant-v5"),
        steps=200_000,
    ),
    Experiment(
        "fig3",
        "Fig. 3, 9",
        "return against steps and time, next to REDQ, SAC and TD3 (MBPO: not here)",
        "near REDQ per step in a sixth of its time; SAC's return in half the time",
        (ALM, REDQ, SAC, TD3),
        tasks=(*TRUNCATED, "Ant-v5", "Humanoid-v5"),
    ),
    Experiment(
        "fig4",
        "Fig. 4, 8",
        "normalised bias of the bound and of Q during training (SAC-AVG: not here)",
        "the deviation of the bias is below REDQ's and SAC-AVG's",
        (ALM, REDQ, SAC),
        tasks=TRUNCATED,
        kind="bias",
    ),
    Experiment(
        "fig5a",
        "Fig. 5a, 10a",
        "objective without its KL, value or classifier term",
        "KL crucial, classifier stabilises, value neutral",
        (
            ALM,
            NO_KL,
            Variant("alm-no-value", "no value", {"value_coef": 0.0}),
            Variant("alm-no-classifier", "no classifier", {"classifier_coef": 0.0}),
        ),
    ),
    Experiment(
        "fig5b",
        "Fig. 5b, 10b",
        "horizon K (the paper's values are in its plot only), next to SAC",
        "K = 3 best, all generally above SAC",
        (_horizon(1), ALM, _horizon(5), SAC),
    ),
    Experiment(
        "fig5c",
        "Fig. 5c, 10c",
        "TD3's actor loss on ALM's representation, next to TD3 with the same networks",
        "faster than TD3",
        (
            ALM,
            Variant(
                "alm-td3-actor",
                "ALM(3), TD3 actor",
                {"actor_objective": "qvalue", "classifier_coef": 0.0},
            ),
            TD3,
        ),
    ),
    Experiment(
        "fig7",
        "Fig. 7",
        "open-loop latent rollout against the encoded truth, with and without KL",
        "accurate for about 20 steps; without KL wrong after 2",
        (ALM, NO_KL),
        tasks=("HalfCheetah-v5",),
        kind="rollout",
    ),
    Experiment(
        "fig11",
        "Fig. 11, 20",
        "weight c of the classifier's log ratio",
        "robust",
        (ALM, _coefficient(0.01), _coefficient(0.5), _coefficient(1.0)),
    ),
    Experiment(
        "fig12",
        "Fig. 6, 12",
        "log-transformed rewards (A.8)",
        "plain log much worse; encoder and model only: no effect; a = 10000: no harm",
        (
            ALM,
            Variant("alm-log", "log R", {"log_reward": "plain"}),
            Variant("alm-log-model", "log r in the model", {"log_reward": "model"}),
            Variant("alm-log-shifted", "a log(1 + R/a)", {"log_reward": "shifted"}),
        ),
    ),
    Experiment(
        "fig13",
        "Fig. 13",
        "identity encoder, an MnM-like ablation",
        "much worse",
        (ALM, Variant("alm-identity", "identity encoder", {"encoder": "identity"})),
    ),
    Experiment(
        "fig14",
        "Fig. 14",
        "a million steps, next to SAC",
        "above SAC",
        (ALM, SAC),
        steps=1_000_000,
    ),
    Experiment(
        "fig15",
        "Fig. 15",
        "encoder and model by maximum likelihood (reconstruction)",
        "worse",
        (
            ALM,
            Variant("alm-likelihood", "likelihood", {"model_objective": "likelihood"}),
        ),
    ),
    Experiment(
        "fig16",
        "Fig. 16",
        "linear classifier",
        "robust",
        (ALM, Variant("alm-linear", "linear classifier", {"classifier": "linear"})),
    ),
    Experiment(
        "fig17",
        "Fig. 17",
        "noise in the dynamics (the paper's levels are not published)",
        "robust",
        (ALM, _noise(0.05), _noise(0.1), _noise(0.2)),
        tasks=("HalfCheetah-v5",),
    ),
    Experiment(
        "fig18",
        "Fig. 18",
        "encoder also trained to predict the value",
        "in the plots only",
        (
            ALM,
            Variant(
                "alm-value-encoder",
                "encoder predicts Q",
                {"value_prediction": "encoder"},
            ),
        ),
    ),
    Experiment(
        "fig19",
        "Fig. 19",
        "encoder and model also trained to predict the value",
        "in the plots only",
        (
            ALM,
            Variant(
                "alm-value-model",
                "both predict Q",
                {"value_prediction": "model"},
            ),
        ),
    ),
)

EXPERIMENTS: dict[str, Experiment] = {one.name: one for one in _LISTED}
"""All experiments by name."""


@dataclass(frozen=True)
class Scale:
    """How much of an experiment to do.

    Example:
        >>> SCALES["paper"].seeds, sorted(SCALES["small"].tasks)
        (5, ['HalfCheetah-v5', 'Pendulum-v1'])
    """

    note: str
    """What every output says about it."""
    seeds: int
    """Seeds 0, 1, ..."""
    settings: Mapping[str, Any]
    """Fields of :class:`~alm_torchrl.runs.settings.TrainConfig` for all runs."""
    tasks: Mapping[str, Mapping[str, Any]] | None = None
    """Tasks, each with settings of its own; None: those of the experiment."""
    pairs: int = 1000
    """State-action pairs on which a bias is measured."""
    rollout: int = 50
    """Steps that the latent model predicts."""


_TINY = {
    "preset": "quick",
    "total_steps": 6,
    "warmup_steps": 24,
    "batch_size": 4,
    "latent_dim": 4,
    "hidden_dim": 8,
    "model_hidden_dim": 8,
    "eval_interval": 3,
    "eval_episodes": 1,
    "log_interval": 3,
    "checkpoint_interval": 3,
    "logger": "none",
}

SCALES: dict[ScaleName, Scale] = {
    "smoke": Scale(
        "smoke test: the numbers mean nothing",
        seeds=2,
        settings=_TINY,
        tasks={"InvertedPendulum-v5": {"action_bounds": "rescale"}},
        pairs=20,
        rollout=3,
    ),
    "small": Scale(
        "reduced: small networks, few steps, other settings than the paper's",
        seeds=3,
        settings={"preset": "quick"},
        tasks={
            "HalfCheetah-v5": {},
            "Pendulum-v1": {
                "action_bounds": "rescale",
                "total_steps": 1500,
                "warmup_steps": 500,
                "eval_interval": 500,
            },
        },
    ),
    "paper": Scale("the paper's settings", seeds=5, settings={"preset": "paper"}),
}
"""How much of an experiment to do, by name."""


@dataclass(frozen=True)
class Planned:
    """A run of an experiment.

    Example:
        >>> first = plan(EXPERIMENTS["fig3"], "paper")[0]
        >>> first.variant.label, first.config.task, first.config.total_steps
        ('ALM(3)', 'T-Humanoid-v5', 300000)
    """

    variant: Variant
    """The line it belongs to."""
    config: TrainConfig
    """Its settings."""


def plan(
    experiment: Experiment,
    scale: ScaleName,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    tasks: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """The runs of an experiment.

    Args:
        experiment: which.
        scale: ``"smoke"``, ``"small"`` or ``"paper"``.

    Keyword Args:
        seeds: number of seeds. Default: ``None``, the scale's.
        steps: training steps. Default: ``None``, the scale's or the experiment's.
        tasks: some of the tasks. Default: ``()``, all.
        settings: fields of ``TrainConfig`` for all runs, in
            place of the scale's. Default: ``None``.

    Returns:
        list[Planned]: by task, then variant, then seed.

    Raises:
        ValueError: if a task is not one of the experiment's at this scale.

    Examples:
        >>> runs = plan(EXPERIMENTS["fig5a"], "small", seeds=1)
        >>> len(runs), runs[1].variant.label, runs[1].config.kl_coef
        (8, 'no KL', 0.0)
    """
    size = SCALES[scale]
    available = (
        {task: {} for task in experiment.tasks} if size.tasks is None else size.tasks
    )
    if experiment.tasks == ("HalfCheetah-v5",):
        # The others of a scale need not have a simulator.
        available = dict([next(iter(available.items()))])
    if unknown := set(tasks) - set(available):
        raise ValueError(
            f"--tasks: expected some of {sorted(available)}, got {sorted(unknown)}"
        )
    own: dict[str, Any] = {"total_steps": experiment.steps} if scale == "paper" else {}
    if experiment.kind == "bias":
        # The bias is measured at each of them.
        own["keep_checkpoints"] = 1000
    chosen = {"total_steps": steps} if steps is not None else {}
    return [
        Planned(
            variant,
            preset_config(
                **{
                    **size.settings,
                    **own,
                    **available[task],
                    **variant.changes,
                    **chosen,
                    **(settings or {}),
                    "task": task,
                    "seed": seed,
                }
            ),
        )
        for task in (tasks or available)
        for variant in experiment.variants
        for seed in range(size.seeds if seeds is None else seeds)
    ]

"""The paper's experiments as data: what to train on which tasks, and what came out.

Each :class:`Experiment` is a table or figure of Ghugare et al. (ICLR 2023). A
:class:`Scale` says how much of it to do: which tasks, seeds, steps and networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from alm_torchrl.runs.options import ScaleName
from alm_torchrl.runs.settings import TrainConfig, preset_config

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "Experiment",
    "Scale",
    "Variant",
    "plan",
]

Kind = Literal["curves", "bias", "rollout"]


@dataclass(frozen=True)
class Variant:
    """One line of a figure: a name and the settings that make it.

    Example:
        >>> EXPERIMENTS["fig5b"].variants[0]
        Variant(name='alm-k1', label='ALM(1)', changes={'horizon': 1})
    """

    name: str
    """Used in file names."""
    label: str
    """Used in legends and tables."""
    changes: dict[str, Any]
    """Fields of :class:`~alm_torchrl.runs.settings.TrainConfig` that differ."""


_VARIANTS = (
    Variant("alm", "ALM(3)", {}),
    Variant("sac", "SAC", {"agent": "sac"}),
    Variant("td3", "TD3 (ours)", {"agent": "td3"}),
    Variant("redq", "REDQ", {"agent": "redq"}),
    Variant("alm-ent", "ALM-ENT(3)", {"entropy": True}),
    Variant("alm-no-kl", "no KL", {"kl_coef": 0.0}),
    Variant("alm-no-value", "no value", {"value_coef": 0.0}),
    Variant("alm-no-classifier", "no classifier", {"classifier_coef": 0.0}),
    Variant("alm-k1", "ALM(1)", {"horizon": 1}),
    Variant("alm-k5", "ALM(5)", {"horizon": 5}),
    Variant(
        "alm-td3-actor",
        "ALM(3), TD3 actor",
        {"actor_objective": "qvalue", "classifier_coef": 0.0},
    ),
    Variant("alm-c0.01", "c = 0.01", {"classifier_coef": 0.01}),
    Variant("alm-c0.5", "c = 0.5", {"classifier_coef": 0.5}),
    Variant("alm-c1", "c = 1", {"classifier_coef": 1.0}),
    Variant("alm-log", "log R", {"log_reward": "plain"}),
    Variant("alm-log-model", "log r in the model", {"log_reward": "model"}),
    Variant("alm-log-shifted", "a log(1 + R/a)", {"log_reward": "shifted"}),
    Variant("alm-identity", "identity encoder", {"encoder": "identity"}),
    Variant("alm-likelihood", "likelihood", {"model_objective": "likelihood"}),
    Variant("alm-linear", "linear classifier", {"classifier": "linear"}),
    Variant("alm-noise0.05", "noise 0.05", {"dynamics_noise": 0.05}),
    Variant("alm-noise0.1", "noise 0.1", {"dynamics_noise": 0.1}),
    Variant("alm-noise0.2", "noise 0.2", {"dynamics_noise": 0.2}),
    Variant("alm-value-encoder", "encoder predicts Q", {"value_prediction": "encoder"}),
    Variant("alm-value-model", "both predict Q", {"value_prediction": "model"}),
)
_BY_NAME = {one.name: one for one in _VARIANTS}
_TASKS = ("T-Humanoid-v5", "T-Ant-v5", "HalfCheetah-v5", "Walker2d-v5", "Hopper-v5")


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, as runs to make and something to draw.

    Example:
        >>> one = EXPERIMENTS["table1"]
        >>> one.source, one.steps, one.tasks[0]
        ('Table 1', 200000, 'T-Humanoid-v5')
    """

    name: str
    """Its name for ``alm-torchrl reproduce``."""
    source: str
    """Table or figure of the paper."""
    question: str
    """What it compares."""
    published: str
    """What the paper found."""
    names: str
    """Names of the variants, the lines of the figure, separated by spaces."""
    tasks: tuple[str, ...] = _TASKS
    """Tasks at paper scale; Gymnasium's v5 for the paper's v2."""
    steps: int = 300_000
    """Training steps at paper scale."""
    kind: Kind = "curves"
    """Learning curves; or bias, or latent rollouts, of the trained agents."""
    timed: bool = False
    """Whether its learning curves are drawn over wall time, too."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The lines of the figure."""
        return tuple(_BY_NAME[name] for name in self.names.split())


_LISTED = (
    Experiment(
        "table1",
        "Table 1",
        "return after 200,000 training steps",
        "T-Humanoid 5306+-437, T-Ant 4887+-1027, HalfCheetah 10789+-366, Walker2d "
        "3006+-1183, Hopper 2546+-1074",
        "alm",
        steps=200_000,
    ),
    Experiment(
        "table5",
        "Table 5",
        "ALM-ENT: stochastic actor with SAC's entropy bonus",
        "T-Humanoid 4747+-900, T-Ant 4921+-128 after 200,000 steps",
        "alm alm-ent",
        tasks=("T-Humanoid-v5", "T-Ant-v5"),
        steps=200_000,
    ),
    Experiment(
        "fig3",
        "Fig. 3, 9",
        "return against steps and time, next to REDQ, SAC and TD3 (MBPO: not here)",
        "near REDQ per step in a sixth of its time; SAC's return in half the time",
        "alm redq sac td3",
        tasks=(*_TASKS, "Ant-v5", "Humanoid-v5"),
        timed=True,
    ),
    Experiment(
        "fig4",
        "Fig. 4, 8",
        "normalised bias of the bound and of Q during training (SAC-AVG: not here)",
        "the deviation of the bias is below REDQ's and SAC-AVG's",
        "alm redq sac",
        kind="bias",
    ),
    Experiment(
        "fig5a",
        "Fig. 5a, 10a",
        "objective without its KL, value or classifier term",
        "KL crucial, classifier stabilises, value neutral",
        "alm alm-no-kl alm-no-value alm-no-classifier",
    ),
    Experiment(
        "fig5b",
        "Fig. 5b, 10b",
        "horizon K (the paper's values are in its plot only), next to SAC",
        "K = 3 best, all generally above SAC",
        "alm-k1 alm alm-k5 sac",
    ),
    Experiment(
        "fig5c",
        "Fig. 5c, 10c",
        "TD3's actor loss on ALM's representation, next to TD3 with the same networks",
        "faster than TD3",
        "alm alm-td3-actor td3",
    ),
    Experiment(
        "fig7",
        "Fig. 7",
        "open-loop latent rollout against the encoded truth, with and without KL",
        "accurate for about 20 steps; without KL wrong after 2",
        "alm alm-no-kl",
        tasks=("HalfCheetah-v5",),
        kind="rollout",
    ),
    Experiment(
        "fig11",
        "Fig. 11, 20",
        "weight c of the classifier's log ratio",
        "robust",
        "alm alm-c0.01 alm-c0.5 alm-c1",
    ),
    Experiment(
        "fig12",
        "Fig. 6, 12",
        "log-transformed rewards (A.8)",
        "plain log much worse; encoder and model only: no effect; a = 10000: no harm",
        "alm alm-log alm-log-model alm-log-shifted",
    ),
    Experiment(
        "fig13",
        "Fig. 13",
        "identity encoder, an MnM-like ablation",
        "much worse",
        "alm alm-identity",
    ),
    Experiment(
        "fig14",
        "Fig. 14",
        "a million steps, next to SAC",
        "above SAC",
        "alm sac",
        steps=1_000_000,
    ),
    Experiment(
        "fig15",
        "Fig. 15",
        "encoder and model by maximum likelihood (reconstruction)",
        "worse",
        "alm alm-likelihood",
    ),
    Experiment("fig16", "Fig. 16", "linear classifier", "robust", "alm alm-linear"),
    Experiment(
        "fig17",
        "Fig. 17",
        "noise in the dynamics (the paper's levels are not published)",
        "robust",
        "alm alm-noise0.05 alm-noise0.1 alm-noise0.2",
        tasks=("HalfCheetah-v5",),
    ),
    Experiment(
        "fig18",
        "Fig. 18",
        "encoder also trained to predict the value",
        "in the plots only",
        "alm alm-value-encoder",
    ),
    Experiment(
        "fig19",
        "Fig. 19",
        "encoder and model also trained to predict the value",
        "in the plots only",
        "alm alm-value-model",
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
    """Part of every output."""
    seeds: int
    """Seeds 0, 1, ..."""
    settings: dict[str, Any]
    """Fields of :class:`~alm_torchrl.runs.settings.TrainConfig` for all runs."""
    tasks: dict[str, dict[str, Any]] | None = None
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
    "eval_interval": 6,
    "eval_episodes": 1,
    "log_interval": 6,
    "checkpoint_interval": 12,
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


def plan(
    experiment: Experiment,
    scale: ScaleName,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    tasks: tuple[str, ...] = (),
    **settings: Any,
) -> list[tuple[Variant, TrainConfig]]:
    """The runs of an experiment, by task, then variant, then seed.

    Args:
        experiment: the experiment.
        scale: ``"smoke"``, ``"small"`` or ``"paper"``.

    Keyword Args:
        seeds: number of seeds. Default: ``None``, the scale's.
        steps: training steps. Default: ``None``, the scale's or the experiment's.
        tasks: some of the tasks. Default: ``()``, all.
        **settings: fields of ``TrainConfig`` for all runs, in place of the scale's.

    Returns:
        list: the line that each run belongs to, and its settings.

    Raises:
        ValueError: if a task is not one of the experiment's at this scale.

    Examples:
        >>> runs = plan(EXPERIMENTS["fig5a"], "small", seeds=1)
        >>> len(runs), runs[1][0].label, runs[1][1].kl_coef
        (8, 'no KL', 0.0)
    """
    size = SCALES[scale]
    available = size.tasks or {task: {} for task in experiment.tasks}
    if experiment.tasks == ("HalfCheetah-v5",):
        # The other tasks of a scale may have no simulator.
        available = dict([next(iter(available.items()))])
    if unknown := set(tasks) - set(available):
        raise ValueError(
            f"--tasks: expected some of {sorted(available)}, got {sorted(unknown)}"
        )
    own: dict[str, Any] = {"total_steps": experiment.steps} if scale == "paper" else {}
    if experiment.kind == "bias":
        # The bias is measured at each of them.
        own["keep_checkpoints"] = 1000
    if steps is not None:
        settings["total_steps"] = steps

    found = []
    for task in tasks or available:
        for variant in experiment.variants:
            fields = size.settings | own | available[task] | variant.changes | settings
            for seed in range(size.seeds if seeds is None else seeds):
                config = preset_config(**{**fields, "task": task, "seed": seed})
                found.append((variant, config))
    return found

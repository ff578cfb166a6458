"""A standard TorchRL Trainer, wired for ALM and for its baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.record.loggers import Logger

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer, check_steps, check_type
from alm_torchrl.compat import keep_last_logs, uncount_update
from alm_torchrl.envs import Normalizers
from alm_torchrl.objectives import ALMLoss, RewardScale
from alm_torchrl.replay import make_replay_buffer
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from alm_torchrl.training.checkpoint import (
    RandomState,
    VerifiedCheckpoint,
    clear_leftovers,
)
from alm_torchrl.training.collector import OpenCollector
from alm_torchrl.training.episode import (
    CollectorState,
    episode_steps,
    repeatable,
)
from alm_torchrl.training.episode_length import (
    EpisodeLengthCheck,
)
from alm_torchrl.training.fit import check_fit, check_modes
from alm_torchrl.training.hooks import (
    BestCheckpoint,
    EpisodeLog,
    EvaluationHook,
    NonFiniteCheck,
    ProgressBar,
    episode_ends,
)
from alm_torchrl.training.pace import Pace
from alm_torchrl.training.rotation import MilestoneRotation
from alm_torchrl.training.stepper import ALMOptimizationStepper, NonFiniteError

__all__ = ["make_trainer"]


def make_trainer(
    env: EnvBase,
    loss: ALMLoss | BaselineLoss,
    *,
    total_steps: int,
    warmup_steps: int = 5000,
    updates_per_step: float = 1.0,
    batch_size: int = 512,
    horizon: int = 3,
    short_slices: bool = False,
    recency_decay: float = 1.0,
    recency_floor: float = 0.1,
    capacity: int = 100_000,
    memmap_dir: str | Path | None = None,
    lr: float = 1e-4,
    lr_final: float | None = None,
    lr_steps: int = 200_000,
    clip_norm: float = 100.0,
    weight_decay: float = 0.0,
    tau: float = 0.005,
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    compile: bool = False,
    cudagraph: bool | None = None,
    eval_env: EnvBase | None = None,
    eval_interval: int = 5000,
    eval_episodes: int = 5,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    logger: Logger | None = None,
    log_interval: int = 1000,
    checkpoint_dir: str | Path | None = None,
    checkpoint_interval: int = 5000,
    keep_checkpoints: int = 2,
    keep_every: int | None = None,
    checkpoint_metadata: Callable[[], Mapping[str, Any]] | None = None,
    progress_bar: bool = False,
    seed: int = 0,
) -> ALMTrainer:
    """Wires environment, loss, replay, stepper, schedule and evaluation together.

    ``warmup_steps`` uniformly random environment steps without updates, then one
    update per environment step: the action of training step n uses the noise of
    step n - 1, its update that of step n. E environments make a step each, then come
    E updates. Evaluation, logging and saving change nothing in the training: its
    parameters are bit-equal with and without them.

    The result is an ordinary :class:`~torchrl.trainers.Trainer`: register further
    hooks on it, then call ``train()``. Its frames include the warm-up.

    A trainer made with the same arguments continues exactly where another one was
    saved, bit by bit on an eager CPU, if ``load_from_file(checkpoint)`` is called
    before ``train()``. The running episode is repeated for it: see
    :class:`~alm_torchrl.EpisodeEnv`, which is put around ``env``, or around each
    environment in a ``SerialEnv``, and gives each episode a seed of its own. With
    ``ParallelEnv`` and natively batched environments it starts fresh episodes.

    Args:
        env (EnvBase): environment to train in, of batch size [], or [E] for E
            environments: ``SerialEnv``, ``ParallelEnv``, or a natively batched one.
        loss (ALMLoss or BaselineLoss): the loss, on the device to train on. It
            decides the algorithm: see :mod:`alm_torchrl.baselines` for TD3, SAC and
            REDQ.

    Keyword Args:
        total_steps (int): training steps (updates), warm-up excluded.
        warmup_steps (int): random steps before them, at least ``horizon`` and
            ``batch_size`` and at most ``capacity``; rounded up to a multiple of E.
            Default: ``5000``.
        updates_per_step (float): updates for each environment step after them, above
            0; less than 1 for simulators that are much faster than an update.
            Default: ``1.0``.
        batch_size (int): slices, and transitions, per update. REDQ draws a batch for
            each of its updates. Default: ``512``.
        horizon (int): length K of the slices. The baselines use transitions only.
            Default: ``3``.
        short_slices (bool): whether slices may reach beyond their episode's end, as in
            :func:`~alm_torchrl.make_replay_buffer`. Default: ``False``.
        recency_decay (float): weight of a row that is one row older, likewise.
            Default: ``1.0``, uniform.
        recency_floor (float): smallest weight, likewise. Default: ``0.1``.
        capacity (int): transitions that the replay holds. Default: ``100_000``.
        memmap_dir (str or Path, optional): keep the replay in files there.
            Default: ``None``, in memory.
        lr (float): learning rate of all optimizers. Default: ``1e-4``.
        lr_final (float, optional): of ALM, as of
            :class:`~alm_torchrl.ALMOptimizationStepper`. Default: ``None``.
        lr_steps (int): likewise. Default: ``200_000``.
        clip_norm (float): largest gradient norm of each. Default: ``100.0``.
        weight_decay (float): of ALM, likewise. Default: ``0.0``.
        tau (float): share by which the targets move. Default: ``0.005``.
        precision (str): ``"fp32"``, ``"tf32"`` (CUDA only) or ``"bf16"``, see
            :class:`~alm_torchrl.ALMOptimizationStepper`. Default: ``"fp32"``.
        compile (bool): run the update as one compiled graph, see
            :class:`~alm_torchrl.ALMOptimizationStepper`. Default: ``False``.
        cudagraph (bool, optional): capture the update as a CUDA graph.
            Default: ``None``, where the loss is on CUDA.
        eval_env (EnvBase, optional): environment for evaluations, not ``env`` itself,
            of batch size [] or [E], which runs E episodes at once
            (:class:`~alm_torchrl.envs.LockstepEnv`). Default: ``None``, no
            evaluations.
        eval_interval (int): training steps between evaluations, the first at
            training step 0. Default: ``5000``.
        eval_episodes (int): whole episodes of each. Default: ``5``.
        on_evaluation (callable, optional): receives ``training_step``,
            ``environment_step``, ``mean_return``, ``std_return`` (n - 1) and
            ``mean_length`` of each evaluation as plain numbers, and where a return
            is not finite, its ``nonfinite_episode``. Default: ``None``.
        logger (Logger, optional): receives losses, metrics and returns by environment
            step. Default: ``None``.
        log_interval (int): environment steps between logged values.
            Default: ``1000``.
        checkpoint_dir (str or Path, optional): where checkpoints go, and in ``best``
            the networks that scored best in an evaluation; what killed saves left
            there is removed, and what is of later steps is set aside.
            Default: ``None``, no checkpoints.
        checkpoint_interval (int): environment steps between them, besides the one at
            the end. Default: ``5000``.
        keep_checkpoints (int): how many of the latest to keep. Default: ``2``.
        keep_every (int, optional): environment steps between checkpoints that are
            never deleted. Default: ``None``, there are none.
        checkpoint_metadata (callable, optional): gives further JSON values for the
            manifest of each checkpoint. Default: ``None``.
        progress_bar (bool): show a progress bar (needs tqdm). Default: ``False``.
        seed (int): seed of environment, actions and updates. Build the loss after
            ``torch.manual_seed`` to fix its parameters too. Default: ``0``.

    Returns:
        ALMTrainer: ready to ``train()``.

    Raises:
        ValueError: if a number is out of range, ``warmup_steps`` does not lie between
            ``batch_size`` and ``capacity``, ``eval_env`` is ``env``, one of them has
            more than one batch dimension or does not fit the networks; if the loss has
            a ``RewardScale`` of another number of environments; if ``cudagraph`` or
            ``"tf32"`` is asked for without CUDA; or if ``precision``, ``compile`` or
            ``cudagraph`` is asked for with a baseline.
        TypeError: if an environment or the loss is of another type.
        KeyError: if the encoder reads what an environment does not give.
        NonFiniteError: while training, if an observation, reward, loss or gradient
            norm is not finite: losses and norms at once on a CPU, within
            ``log_interval`` updates elsewhere. Nothing is saved after it.

    Examples:
        >>> from alm_torchrl import make_alm_loss, make_env, make_trainer
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> trainer = make_trainer(
        ...     env, loss, total_steps=3, warmup_steps=10, batch_size=4
        ... )
        >>> trainer.train()
        >>> trainer.optimization_stepper.optimizer_step_count
        3
    """
    total_steps = check_integer("total_steps", total_steps)
    eval_interval = check_integer("eval_interval", eval_interval)
    eval_episodes = check_integer("eval_episodes", eval_episodes)
    log_interval = check_integer("log_interval", log_interval)
    checkpoint_interval = check_integer("checkpoint_interval", checkpoint_interval)
    keep_checkpoints = check_integer("keep_checkpoints", keep_checkpoints)
    if keep_every is not None:
        keep_every = check_integer("keep_every", keep_every)
    seed = check_integer("seed", seed, 0, 2**31 - 1)
    if isinstance(loss, BaselineLoss):
        horizon = 1
    else:
        check_type("loss", loss, ALMLoss)
    warmup_steps, capacity, batch_size, horizon = check_steps(
        warmup_steps=warmup_steps,
        capacity=capacity,
        batch_size=batch_size,
        horizon=horizon,
    )
    if isinstance(loss, BaselineLoss):
        check_modes(
            loss.agent, precision=precision, compile=compile, cudagraph=cudagraph
        )
    if eval_env is env:
        raise ValueError("eval_env must be another environment than env, got the same.")
    for name, environment in (("env", env), ("eval_env", eval_env)):
        if environment is None:
            continue
        check_type(name, environment, EnvBase, "make_env makes one")
        if len(environment.batch_size) > 1:
            raise ValueError(
                f"{name} must have at most one batch dimension, got batch size "
                f"{list(environment.batch_size)}."
            )
        check_fit(name, environment, loss)
    pace = Pace(warmup_steps, env.batch_size.numel(), updates_per_step)
    observers = [m for m in loss.modules() if isinstance(m, RewardScale)]
    for observer in observers:
        if observer.num_envs != pace.num_envs:
            raise ValueError(
                f"loss: expected RewardScale(num_envs={pace.num_envs}), the number of "
                f"environments in env, got num_envs={observer.num_envs}."
            )
    normalizers = Normalizers(env)
    carried = {"normalizers": normalizers} if normalizers.names else {}
    if eval_env is not None and Normalizers(eval_env).names != normalizers.names:
        raise ValueError(
            f"eval_env must have the normalising wrappers of env, {normalizers.names}, "
            f"got {Normalizers(eval_env).names}."
        )
    torch.manual_seed(seed)
    env = repeatable(env)
    env.set_seed(seed)
    policy = loss.acting_policy()
    device = next(loss.parameters()).device
    collector = OpenCollector(
        env,
        policy,
        frames_per_batch=pace.num_envs,
        total_frames=-1,
        init_random_frames=pace.warmup_steps,
        policy_device=None if device.type == "cpu" else device,
        # Without it the collector would not wait for an action's way to the CPU.
        env_device=None if device.type == "cpu" else env.device,
        # Each step is a new TensorDict already, and needs no copy.
        use_buffers=False,
        return_same_td=True,
        auto_register_policy_transforms=False,
    )
    optimization: dict[str, float] = {"lr": lr, "clip_norm": clip_norm, "tau": tau}
    stepper: ALMOptimizationStepper | BaselineOptimizationStepper
    if isinstance(loss, BaselineLoss):
        batch_size *= loss.updates_per_step
        stepper = BaselineOptimizationStepper(loss, **optimization)
    else:
        stepper = ALMOptimizationStepper(
            loss,
            **optimization,
            lr_final=lr_final,
            lr_steps=lr_steps,
            weight_decay=weight_decay,
            precision=precision,
            compile=compile,
            cudagraph=cudagraph,
        )
    buffer = make_replay_buffer(
        capacity,
        batch_size=batch_size,
        horizon=horizon,
        n_step=1 if isinstance(loss, BaselineLoss) else loss.critic_target.n_step,
        short_slices=short_slices,
        recency_decay=recency_decay,
        recency_floor=recency_floor,
        memmap_dir=memmap_dir,
    )

    def metadata(*_: Any) -> dict[str, Any]:
        # On a GPU the check of the updates is deferred: not beyond a save.
        stepper.raise_if_nonfinite()
        return {} if checkpoint_metadata is None else dict(checkpoint_metadata())

    checkpoint, rotation, best = None, None, None
    if checkpoint_dir is not None:
        checkpoint_dir = Path(checkpoint_dir)
        clear_leftovers(checkpoint_dir)
        checkpoint = VerifiedCheckpoint(
            rng=RandomState(), collector=CollectorState(collector), **carried
        )
        rotation = MilestoneRotation(
            checkpoint_dir,
            keep_last=keep_checkpoints,
            keep_every=keep_every,
            stride=pace.num_envs,
        )
        best = BestCheckpoint(
            loss, checkpoint_dir / "best", metadata=metadata, **carried
        )
    trainer = ALMTrainer(
        collector=collector,
        total_frames=pace.environment_steps(total_steps),
        frame_skip=1,
        optim_steps_per_batch=pace.updates(pace.warmup_steps + pace.num_envs) + 1,
        loss_module=loss,
        optimization_stepper=stepper,
        replay_buffer=buffer,
        logger=logger,
        progress_bar=False,
        # The Trainer lets one step more than its intervals pass.
        log_interval=log_interval - 1,
        checkpoint=checkpoint,
        checkpoint_rotation=rotation,
        checkpoint_metadata=None if rotation is None else metadata,
        save_trainer_interval=checkpoint_interval - 1,
    )
    keep_last_logs(trainer)
    trainer.pace, trainer.total_steps = pace, total_steps

    stored = [*loss.in_keys, ("collector", "traj_ids")]
    schedule = loss.noise_schedule

    def extend(batch: TensorDictBase) -> None:
        trainer.whole_at = None
        # The time dimension, of one step, comes last.
        rows = batch.select(*stored)[..., 0]
        rows["next", "done"] = ends = episode_ends(batch, env)[..., 0, :]
        for key, value in rows.items(include_nested=True, leaves_only=True):
            if value.is_floating_point() and not value.isfinite().all():
                name = key if isinstance(key, str) else "/".join(key)
                step = trainer.collected_frames + pace.num_envs
                raise NonFiniteError(name, step, unit="environment step")
        if rows.batch_size:
            buffer.extend(rows)
        else:  # A batch of one row would take half as long again.
            buffer.add(rows)
        for observer in observers:
            observer.observe(rows["next", env.reward_key], ends)

    def sample(_: TensorDictBase) -> TensorDictBase:
        # The Trainer asks for one update too many, and has counted it.
        if stepper.optimizer_step_count >= trainer.training_steps:
            uncount_update(trainer)
            raise StopIteration
        if schedule is not None:
            schedule.step()
        return cast("TensorDictBase", buffer.sample()).to(device)

    def end_step(_: TensorDictBase) -> None:
        trainer.whole_at = episode_steps(env)

    trainer.register_op("batch_process", extend)
    trainer.register_op("process_optim_batch", sample)
    EpisodeLog(env).register(trainer)
    if device.type != "cpu":
        NonFiniteCheck(stepper, log_interval).register(trainer)
    if progress_bar:
        trainer.bar = ProgressBar()
        trainer.bar.register(trainer)
    trainer.register_op("post_steps_log", end_step)
    EpisodeLengthCheck(
        buffer,
        horizon=1 if short_slices else horizon,
        eval_env=eval_env,
    ).register(trainer)
    if best is not None:
        trainer.register_module("best_checkpoint", best)
    if eval_env is not None:

        def report(row: dict[str, Any]) -> None:
            if trainer.bar is not None:
                trainer.bar.show_return(row["mean_return"])
            if on_evaluation is not None:
                on_evaluation(row)
            if best is not None:
                best(row)

        trainer.evaluation = EvaluationHook(
            eval_env,
            policy,
            interval=eval_interval,
            episodes=eval_episodes,
            seed=seed,
            on_evaluation=report,
            normalizers=normalizers,
        )
        trainer.evaluation.register(trainer)
    return trainer

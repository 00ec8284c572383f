"""Optimizers, parameter groups and learning-rate schedules, for every LightningModule here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "poly", "constant")


def check_recipe(optimizer: str, schedule: str, where: str = "") -> None:
    """Refuse an unknown optimizer or schedule.

    Args:
        optimizer: One of `OPTIMIZERS`.
        schedule: One of `SCHEDULES`.
        where: Put before the argument's name, such as "base.".

    Raises:
        ValueError: Naming the argument and what is allowed.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"{where}optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"{where}schedule must be 'cosine', 'poly' or 'constant', got {schedule!r}")


def build_optimizer(
    name: str,
    head: Iterable[nn.Parameter],
    backbone: Iterable[nn.Parameter],
    *,
    lr: float,
    backbone_lr_factor: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """An optimizer with a group for the head and, if anything trains there, one for the backbone.

    Args:
        name: "sgd" or "adamw".
        head: Parameters that learn at ``lr``.
        backbone: Parameters that learn at ``lr * backbone_lr_factor``.
        lr: Learning rate of the head.
        backbone_lr_factor: Learning rate of the backbone, relative to ``lr``.
        momentum: Of SGD; AdamW does not read it.
        weight_decay: Of every parameter.
    """
    groups: list[dict[str, Any]] = [{"params": list(head), "lr": lr}]
    if in_backbone := list(backbone):
        groups.append({"params": in_backbone, "lr": lr * backbone_lr_factor})
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def separate_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for one submodule, whose biases do not decay; as the official CyCTR trains its transformer."""
    named = list(module.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if not n.endswith("bias")]},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def with_schedule(
    trainer: pl.Trainer,
    optimizer: torch.optim.Optimizer,
    schedule: str,
    epochs: int,
    constant_groups: int = 0,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the optimizer with a learning rate that follows a schedule.

    Args:
        trainer: Knows how many steps an epoch has.
        optimizer: Whose groups follow the schedule, step by step.
        schedule: "cosine", "poly" (power 0.9) or "constant".
        epochs: Its length.
        constant_groups: So many of the last groups keep their learning rate.
    """
    trainer.estimated_stepping_batches  # noqa: B018  (makes the trainer count its batches)
    steps_of_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    steps = max(epochs * steps_of_epoch, 1)  # with no epochs nothing is trained, whatever the rate

    def factor(step: int) -> float:
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        if schedule == "poly":  # the official code counts iterations from 1
            return max(1 - (step + 1) / steps, 0) ** 0.9
        return 1.0

    scheduled = [factor] * (len(optimizer.param_groups) - constant_groups)
    constant = [lambda step: 1.0] * constant_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled + constant)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def seed_step(module: pl.LightningModule, seed: int) -> None:
    """Let what a training step draws, such as dropout, depend on seed, step and process alone.

    A global stream would run on differently after a resume, or with another validation.
    """
    trainer = module.trainer
    torch.manual_seed((seed * 1_000_003 + module.global_step) * trainer.world_size + module.global_rank)


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made for something else.

    Raises:
        ValueError: Naming the first entry that differs, both values, and what to do.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"the checkpoint was made with {key}={found.get(key)}, this run has {key}={value}; "
                f"resume it with {key}={found.get(key)}, or start without resume"
            )


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one, for trainers and checkpoints that know only one.

    Their parameter groups and their state are this optimizer's own, so schedulers, gradient scalers and
    ``state_dict`` see all of them and need to know of none.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers: Sequence[torch.optim.Optimizer] = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # puts new groups and a new state in place of the shared ones
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients, if they are to be computed here, then step each in turn."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

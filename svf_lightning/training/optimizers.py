"""Optimizers, parameter groups and learning-rate schedules."""

from collections.abc import Callable
from typing import Any

import torch


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers that step as one, for trainers and checkpoints that know only one.

    Their parameter groups and their state are this optimizer's own, so schedulers, gradient scalers and
    ``state_dict`` see all of them and need to know of none.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
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

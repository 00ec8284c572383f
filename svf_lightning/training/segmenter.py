"""The LightningModule around a few-shot method: one shared step, the recipe, the metric."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import resize
from svf_lightning.training import losses
from svf_lightning.training.metrics import FewShotIoU
from svf_lightning.training.optimizers import JointOptimizer

EvaluationBatch: TypeAlias = tuple[Episode, list[Tensor]]  # with the masks at original resolution


def predict_masks(logits: Tensor, sizes: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Bring letterboxed logits back to the pictures' own resolution and take the larger one.

    Args:
        logits: Shape ``(B, 2, T, T)``, of images letterboxed to ``T`` at the top left.
        sizes: Height and width of each original picture, in pixels.

    Returns:
        Per picture the labels 0 or 1, long, shape ``(H, W)``.

    Source:
        ``ori_resize`` of BAM: the square logits are resized to the longer side, then cropped.
    """
    masks = []
    for item, (height, width) in zip(logits.float(), sizes, strict=True):
        side = max(height, width)
        masks.append(resize(item[None], (side, side))[0, :, :height, :width].argmax(dim=0))
    return masks


class FewShotSegmenter(pl.LightningModule):
    """Train and test a few-shot segmentation method on episodes.

    Args:
        model: A method with a ``backbone``; maps an ``Episode`` to a ``Prediction``.
        classes: The classes under test, as ids of the data set.
        validation_classes: Those under validation; None is those under test.
        loss: Maps a prediction and its episode to a scalar.
        optimizer: "sgd" or "adamw".
        lr: Learning rate of the head.
        backbone_lr_factor: Learning rate of whatever trains in the backbone, relative to ``lr``.
        momentum: Of SGD; AdamW does not read it.
        weight_decay: Of every parameter that trains.
        apart: A submodule that learns apart from the rest, by AdamW at a constant rate and with no decay of
            biases, as CyCTR's transformer: ``{"module": name, "lr": number, "weight_decay": number}``.
        schedule: "cosine", "poly" (power 0.9) or "constant", per step.
        epochs: Length of the schedule. Apart from ``trainer.max_epochs``, so that a run stopped
            early and resumed follows the same curve as one that was never stopped.
        seed: Dropout at step ``t`` draws from (seed, t) alone.
        channels_last: Memory format of the network; the faster one for convolutions on most devices.
        identity: What the checkpoint says of itself (method, backbone, fold, ...), plain
            strings and numbers. A checkpoint that says otherwise is refused.

    Raises:
        ValueError: For an unknown optimizer or schedule, or a submodule that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Iterable[int],
        *,
        validation_classes: Iterable[int] | None = None,
        loss: Callable[[Prediction, Episode], Tensor] = losses.cross_entropy,
        optimizer: str = "sgd",
        lr: float = 0.015,
        backbone_lr_factor: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        apart: Mapping[str, Any] | None = None,
        schedule: str = "cosine",
        epochs: int = 1,
        seed: int = 0,
        channels_last: bool = True,
        identity: dict[str, str | int] | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
        if schedule not in ("cosine", "poly", "constant"):
            raise ValueError(f"schedule must be 'cosine', 'poly' or 'constant', got {schedule!r}")
        self.model: Any = model  # Any: torch types every attribute of a Module as Tensor | Module
        self.loss = loss
        self.optimizer, self.lr, self.backbone_lr_factor = optimizer, lr, backbone_lr_factor
        self.momentum, self.weight_decay = momentum, weight_decay
        self.apart = dict(apart) if apart else None
        if self.apart and self.apart["module"] not in dict(model.named_children()):
            raise ValueError(
                f"apart.module={self.apart['module']!r} is no submodule of {type(model).__name__}; it has "
                f"{', '.join(name for name, _ in model.named_children())}"
            )
        self.schedule, self.epochs = schedule, epochs
        self.seed = seed
        self.channels_last = channels_last
        self.identity = identity or {}
        classes = tuple(classes)
        self.validation_iou = FewShotIoU(classes if validation_classes is None else validation_classes)
        self.test_iou = FewShotIoU(classes)

    def forward(self, episode: Episode) -> Prediction:
        """Segment the queries of a batch of episodes."""
        return self.model(episode)

    def setup(self, stage: str) -> None:
        if self.channels_last:  # after the callbacks' setup, which may replace layers
            self.model.to(memory_format=torch.channels_last)

    def on_train_batch_start(self, batch: Episode, batch_idx: int) -> None:
        # A global stream would run on differently after a resume, or with another validation.
        torch.manual_seed(
            (self.seed * 1_000_003 + self.global_step) * self.trainer.world_size + self.global_rank
        )

    def training_step(self, episode: Episode, batch_idx: int) -> Tensor:
        loss = self.loss(self(episode), episode)
        self.log("train/loss", loss, batch_size=len(episode.query_image))
        return loss

    def evaluation_step(self, batch: EvaluationBatch, iou: FewShotIoU) -> dict[str, list[Tensor]]:
        """Score a batch at original resolution; return the predicted masks, for callbacks."""
        episode, labels = batch
        masks = predict_masks(self(episode).logits, [(label.shape[0], label.shape[1]) for label in labels])
        for mask, label, class_id in zip(masks, labels, episode.class_id.tolist(), strict=True):
            iou.update(mask, label, class_id)
        return {"masks": masks}

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        return self.evaluation_step(batch, self.validation_iou)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        return self.evaluation_step(batch, self.test_iou)

    def on_validation_epoch_end(self) -> None:
        self.report(self.validation_iou, "val")

    def on_test_epoch_end(self) -> None:
        self.report(self.test_iou, "test")

    def report(self, iou: FewShotIoU, stage: str) -> None:
        """Log the sums gathered over all processes under ``stage`` and forget them."""
        scores = iou.compute()
        self.log(f"{stage}/miou", scores["miou"], prog_bar=True)
        self.log(f"{stage}/fb_iou", scores["fb_iou"])
        of_classes = scores["class_iou"].flatten()  # torchmetrics makes a scalar of a vector of one
        for class_id, class_iou in zip(iou.classes, of_classes, strict=True):
            self.log(f"{stage}/class_{class_id}", class_iou)
        iou.reset()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        elsewhere = ("backbone.", f"{self.apart['module']}.") if self.apart else ("backbone.",)
        head = [
            p for n, p in self.model.named_parameters() if not n.startswith(elsewhere) and p.requires_grad
        ]
        backbone = [p for p in self.model.backbone.parameters() if p.requires_grad]
        groups = [{"params": head, "lr": self.lr}]
        if backbone:
            groups.append({"params": backbone, "lr": self.lr * self.backbone_lr_factor})
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=self.momentum, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        if self.apart:
            optimizer = JointOptimizer(optimizer, self.configure_apart())

        self.trainer.estimated_stepping_batches  # noqa: B018  (makes the trainer count its batches)
        steps = self.epochs * math.ceil(
            self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        )

        def factor(step: int) -> float:
            if self.schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
            if self.schedule == "poly":  # the official code counts iterations from 1
                return max(1 - (step + 1) / steps, 0) ** 0.9
            return 1.0

        scheduled = [factor] * len(groups)
        constant = [lambda step: 1.0] * (len(optimizer.param_groups) - len(groups))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled + constant)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_apart(self) -> torch.optim.Optimizer:
        """The optimizer of the submodule that learns apart."""
        assert self.apart is not None
        named = list(self.model.get_submodule(self.apart["module"]).named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if not n.endswith("bias")]},
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.apart["lr"], weight_decay=self.apart["weight_decay"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["svf_lightning"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_identity(checkpoint.get("svf_lightning", {}), self.identity)


def check_identity(found: dict[str, str | int], expected: dict[str, str | int]) -> None:
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

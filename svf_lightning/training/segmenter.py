"""The LightningModule that trains and tests a few-shot method."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from svf_lightning.backbones.efficientnet import rename_zoomed
from svf_lightning.episode import Episode, Prediction
from svf_lightning.models.blocks import resize
from svf_lightning.objects import build_object, check_trust
from svf_lightning.training import losses
from svf_lightning.training.checkpoints import load_checkpoint, load_weights
from svf_lightning.training.metrics import FewShotIoU
from svf_lightning.training.optimizers import (
    JointOptimizer,
    build_optimizer,
    check_identity,
    check_recipe,
    seed_step,
    separate_optimizer,
    with_schedule,
)

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
        network: A method with a ``backbone``; maps an ``Episode`` to a ``Prediction``.
        classes: The classes under test, as ids of the data set; None asks the data module.
        validation_classes: Those under validation; None is those under test.
        loss: Maps a prediction and its episode to a scalar.
        optimizer: "sgd" or "adamw".
        lr: Learning rate of the head.
        backbone_lr_factor: Learning rate of whatever trains in the backbone, relative to ``lr``.
        momentum: Of SGD; AdamW does not read it.
        weight_decay: Of every parameter that trains.
        separate: A submodule that is trained separately, by AdamW at a constant rate and with no decay of
            biases, as CyCTR's transformer: ``{"module": name, "lr": number, "weight_decay": number}``.
        schedule: "cosine", "poly" (power 0.9) or "constant", per step.
        epochs: Length of the schedule. It is not ``trainer.max_epochs``, so that a run stopped early and
            resumed follows the same curve as one that was never stopped.
        seed: Dropout at step ``t`` draws from (seed, t) alone.
        channels_last: Memory format of the network; the faster one for convolutions on most devices.
        identity: What the checkpoint says of itself (method, backbone, fold, ...), plain
            strings and numbers. A checkpoint that says otherwise is refused.
        configuration: Plain values from which :meth:`load_from_checkpoint` can build it all again: ``model``
            and ``finetune``, as in a run's ``config.yaml``.

    Raises:
        ValueError: For an unknown optimizer or schedule, or a submodule that the network does not have.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Iterable[int] | None = None,
        *,
        validation_classes: Iterable[int] | None = None,
        loss: Callable[[Prediction, Episode], Tensor] = losses.cross_entropy,
        optimizer: str = "sgd",
        lr: float = 0.015,
        backbone_lr_factor: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        separate: Mapping[str, Any] | None = None,
        schedule: str = "cosine",
        epochs: int = 1,
        seed: int = 0,
        channels_last: bool = True,
        identity: Mapping[str, str | int] | None = None,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_recipe(optimizer, schedule)
        self.model: Any = network  # Any: torch types every attribute of a Module as Tensor | Module
        self.loss = loss
        self.optimizer, self.lr, self.backbone_lr_factor = optimizer, lr, backbone_lr_factor
        self.momentum, self.weight_decay = momentum, weight_decay
        self.separate = dict(separate) if separate else None
        if self.separate and self.separate["module"] not in dict(network.named_children()):
            raise ValueError(
                f"separate.module={self.separate['module']!r} is no submodule of {type(network).__name__}; "
                f"it has {', '.join(name for name, _ in network.named_children())}"
            )
        self.schedule, self.epochs = schedule, epochs
        self.seed = seed
        self.channels_last = channels_last
        self.identity = dict(identity or {})
        self.configuration = dict(configuration or {})
        if classes is not None:
            self.set_classes(classes, validation_classes)

    def set_classes(self, classes: Iterable[int], validation_classes: Iterable[int] | None = None) -> None:
        """Say which classes are scored, in test and in validation (None: the same), and forget all scores."""
        test = tuple(classes)
        self.test_iou = FewShotIoU(test)
        self.validation_iou = FewShotIoU(test if validation_classes is None else validation_classes)

    def forward(self, episode: Episode) -> Prediction:
        """Segment the queries of a batch of episodes."""
        return self.model(episode)

    def setup(self, stage: str) -> None:
        roles = getattr(getattr(self.trainer, "datamodule", None), "roles", None)
        if not hasattr(self, "test_iou") and roles is not None:
            self.set_classes(roles.test, roles.validation)
        if stage != "predict" and not hasattr(self, "test_iou"):
            raise ValueError(
                "which classes are scored? give FewShotSegmenter classes=[...], or a data module"
            )
        if self.channels_last:  # after the callbacks' setup, which may replace layers
            self.model.to(memory_format=torch.channels_last)

    def on_train_batch_start(self, batch: Episode, batch_idx: int) -> None:
        seed_step(self, self.seed)

    def training_step(self, episode: Episode, batch_idx: int) -> Tensor:
        loss = self.loss(self(episode), episode)
        self.log("train/loss", loss, batch_size=len(episode.query_image))
        return loss

    def evaluation_step(self, batch: EvaluationBatch, iou: FewShotIoU) -> dict[str, list[Tensor]]:
        """Score a batch at original resolution; return the predicted masks, for callbacks."""
        episode, labels = batch
        masks = self.predict_step(batch, 0)
        for mask, label, class_id in zip(masks, labels, episode.class_id.tolist(), strict=True):
            iou.update(mask, label, class_id)
        return {"masks": masks}

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        return self.evaluation_step(batch, self.validation_iou)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> dict[str, list[Tensor]]:
        return self.evaluation_step(batch, self.test_iou)

    def predict_step(self, batch: Episode | EvaluationBatch, batch_idx: int) -> list[Tensor]:
        """Predicted masks, 0 or 1, long, one ``(H, W)`` per query.

        Args:
            batch: Episodes, whose masks come at the size of their queries; or a batch of `FewShotDataModule`
                (episodes and the queries' labels), whose masks come at the size of the labels.
            batch_idx: Not used.
        """
        if isinstance(batch, Episode):
            return list(self(batch).logits.argmax(dim=1))
        episode, labels = batch
        return predict_masks(self(episode).logits, [(label.shape[0], label.shape[1]) for label in labels])

    def on_validation_epoch_end(self) -> None:
        self.report(self.validation_iou, "val")

    def on_test_epoch_end(self) -> None:
        self.report(self.test_iou, "test")

    def report(self, iou: FewShotIoU, stage: str) -> None:
        """Log the sums gathered over all processes under ``stage`` and forget them."""
        scores = iou.compute()
        self.log(f"{stage}/miou", scores["miou"], prog_bar=True)
        self.log(f"{stage}/fb_iou", scores["fb_iou"])
        self.log(f"{stage}/episodes", scores["episodes"].float())
        of_classes = scores["class_iou"].flatten()  # torchmetrics makes a scalar of a vector of one
        for class_id, class_iou in zip(iou.classes, of_classes, strict=True):
            self.log(f"{stage}/class_{class_id}", class_iou)
        iou.reset()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        elsewhere = ("backbone.", f"{self.separate['module']}.") if self.separate else ("backbone.",)
        optimizer = build_optimizer(
            self.optimizer,
            [p for n, p in self.model.named_parameters() if not n.startswith(elsewhere) and p.requires_grad],
            [p for p in self.model.backbone.parameters() if p.requires_grad],
            lr=self.lr,
            backbone_lr_factor=self.backbone_lr_factor,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        constant = 0
        if self.separate:
            module = self.model.get_submodule(self.separate["module"])
            other = separate_optimizer(module, self.separate["lr"], self.separate["weight_decay"])
            optimizer, constant = JointOptimizer(optimizer, other), len(other.param_groups)
        return with_schedule(self.trainer, optimizer, self.schedule, self.epochs, constant)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["svf_lightning"] = self.identity
        checkpoint["configuration"] = self.configuration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_identity(checkpoint.get("svf_lightning", {}), self.identity)
        checkpoint["state_dict"] = rename_zoomed(checkpoint["state_dict"])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        network: nn.Module | None = None,
        *,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> "FewShotSegmenter":
        """A segmenter with the weights of a checkpoint, in eval mode.

        Args:
            checkpoint_path: Such as ``runs/NAME/checkpoints/last.ckpt``, which says how to build the network.
            network: The network to fill, prepared as it was trained. Needed where the checkpoint does not
                come from ``train.py``, and so does not know.
            trust: Modules that the checkpoint may call to build its network, beside those of this package.
            options: Arguments of the constructor other than those that the checkpoint says.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, does not say how to build the network, wants to call code that
                is not trusted, or does not fit.
        """
        checkpoint = load_checkpoint(checkpoint_path)
        configuration = checkpoint.get("configuration") or {}
        recipe = {}
        if network is None:
            if "model" not in configuration:
                raise ValueError(
                    f"{checkpoint_path} does not say how to build its network; give the network that it was "
                    "trained from: load_from_checkpoint(path, network)"
                )
            check_trust(configuration, str(checkpoint_path), trust)
            model = dict(configuration["model"])
            network = build_object(model.pop("network"), f"{checkpoint_path}, model.network")
            build_object(configuration["finetune"], f"{checkpoint_path}, finetune")(network.backbone)
            recipe = {key: value for key, value in model.items() if key not in ("_target_", "loss")}
            if "loss" in model:
                recipe["loss"] = build_object(model["loss"], f"{checkpoint_path}, model.loss")
        identity = checkpoint.get("svf_lightning", {})
        segmenter = cls(
            network, **{**recipe, "identity": identity, "configuration": configuration, **options}
        )
        load_weights(segmenter, checkpoint["state_dict"], checkpoint_path)
        return segmenter.eval()

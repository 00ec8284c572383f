"""BAM's base learner: how it is trained, what file it leaves behind, and how BAM takes it over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from svf_lightning.backbones.backbone import Backbone, dilations
from svf_lightning.backbones.weights import load_exactly
from svf_lightning.data.folds import class_roles
from svf_lightning.data.source import Source
from svf_lightning.episode import IGNORE
from svf_lightning.files import replace_file
from svf_lightning.models.bam import BAM
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.training.optimizers import (
    build_optimizer,
    check_identity,
    check_recipe,
    seed_step,
    with_schedule,
)

Batch = tuple[Tensor, Tensor]


class BaseSegmenter(pl.LightningModule):
    """Train a PSPNet on base classes.

    Args:
        model: The network; all of it trains.
        optimizer: "sgd" or "adamw".
        lr: Learning rate of pyramid pooling and classifier.
        backbone_lr_factor: Learning rate of the backbone, relative to ``lr``.
        momentum: Of SGD; AdamW does not read it.
        weight_decay: Of every parameter.
        epochs: Length of the schedule, "poly" (power 0.9) per step.
        seed: Dropout at step ``t`` draws from (seed, t) alone.
        identity: What the checkpoint says of itself; one that says otherwise is refused.

    Raises:
        ValueError: For an unknown optimizer.

    Source:
        Stage 1 of BAM (Lang et al., CVPR 2022) in chunbolang/BAM.
    """

    def __init__(
        self,
        model: PSPNet,
        *,
        optimizer: str = "sgd",
        lr: float = 2.5e-3,
        backbone_lr_factor: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        epochs: int = 100,
        seed: int = 0,
        identity: dict[str, str | int] | None = None,
    ) -> None:
        super().__init__()
        check_recipe(optimizer, "poly", "base.")
        self.model = model.requires_grad_(True)
        self.optimizer, self.lr, self.backbone_lr_factor = optimizer, lr, backbone_lr_factor
        self.momentum, self.weight_decay = momentum, weight_decay
        self.epochs, self.seed = epochs, seed
        self.identity = identity or {}
        self.confusion = MulticlassConfusionMatrix(model.classes + 1, ignore_index=IGNORE)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self, self.seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, ignore_index=IGNORE)
        self.log("train/loss", loss, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.confusion.update(self.model(images).argmax(dim=1), labels)

    def on_validation_epoch_end(self) -> None:
        self.log("val/base_miou", base_miou(self.confusion.compute()), prog_bar=True)
        self.confusion.reset()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = build_optimizer(
            self.optimizer,
            [*self.model.ppm.parameters(), *self.model.cls.parameters()],
            self.model.backbone.parameters(),
            lr=self.lr,
            backbone_lr_factor=self.backbone_lr_factor,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return with_schedule(self.trainer, optimizer, "poly", self.epochs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["svf_lightning"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_identity(checkpoint.get("svf_lightning", {}), self.identity)


def base_miou(confusion: Tensor) -> Tensor:
    """Mean IoU of the base classes, background left out.

    Args:
        confusion: Pixels of each true (rows) and predicted (columns) label, background first, square.

    Returns:
        A scalar in [0, 1], over the classes that occur in truth or prediction; 0 if none does.

    Example:
        >>> round(base_miou(torch.tensor([[9, 1, 0], [0, 4, 0], [0, 0, 0]])).item(), 3)  # 4 of 5 pixels
        0.8
    """
    matrix = confusion.double()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diagonal()
    iou = (matrix.diagonal() / union.clamp_min(1))[1:]
    return iou.sum() / (union[1:] > 0).sum().clamp_min(1)


def bam(
    backbone: Backbone,
    *,
    source: Source,
    fold: int,
    base: str | Path | None = None,
    backbone_name: str | None = None,
    force: bool = False,
    selection: str = "novel",
    own_stages: Sequence[str] | None = None,
    **options: Any,
) -> BAM:
    """Build BAM around a backbone, both with the weights that a base learner's training left behind.

    Args:
        backbone: Filled in place.
        source: The data set, which knows its base classes.
        fold: Which quarter of the classes is novel.
        base: The file: ``base.pth`` of ``python train.py task=base``, or a ``best.pth`` of chunbolang/BAM.
            None leaves backbone and base learner as they are, for a checkpoint of BAM to fill.
        backbone_name: What a file of ours must call its backbone; None accepts any that fits.
        force: Take a base learner of another fold all the same, although it has seen novel classes.
        selection: "base" if the run keeps base classes for validation, which the base learner must not know.
        own_stages: Of :class:`BAM`; None is no stage.
        options: Of :class:`BAM`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or was trained for another data set, fold or backbone.
    """
    classes = class_roles(*source.classes(fold), selection).train
    pspnet = PSPNet(backbone, len(classes))
    if base is not None:
        classes = load_base(
            pspnet,
            base,
            source=source,
            fold=fold,
            selection=selection,
            backbone_name=backbone_name,
            force=force,
        )
    learner = nn.Sequential(pspnet.ppm, pspnet.cls)
    return BAM(backbone, base_learner=learner, base_classes=classes, own_stages=own_stages or (), **options)


def save_base(path: Path, model: PSPNet, header: Mapping[str, Any]) -> None:
    """Write the file that :func:`load_base` reads, whole or not at all.

    Args:
        path: The file.
        model: Backbone and base learner.
        header: Plain values: ``data``, ``fold``, ``classes`` (ids, in the base learner's order) and
            ``backbone``, and whatever else is worth knowing.
    """
    header = {**header, "count": model.classes, "dilations": dilations(model.backbone)}
    content = {"base_learner": header, "state_dict": model.state_dict()}
    replace_file(path, lambda temporary: torch.save(content, temporary))


def load_base(
    model: PSPNet,
    path: str | Path,
    *,
    source: Source,
    fold: int,
    selection: str = "novel",
    backbone_name: str | None = None,
    force: bool = False,
) -> tuple[int, ...]:
    """Fill a PSPNet from a file of :func:`save_base`, or from a ``best.pth`` of chunbolang/BAM.

    A file of the original does not say what it was trained on. Its fold is taken from its folder
    (``.../split0/resnet50/best.pth``); where no folder says it, ``force`` has to.

    Args:
        model: Filled in place.
        path: The file.
        source: The data set of this run.
        fold: The fold of this run.
        selection: Of this run; see :func:`bam`.
        backbone_name: The backbone of this run; None accepts any that fits.
        force: Accept another fold, or an unknown one.

    Returns:
        Ids of the base learner's classes, in its order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or was trained for something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no base learner at {path}; train one with `python train.py task=base`, or name one that exists"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, header = content["state_dict"], content.get("base_learner")
    except Exception as error:  # torch raises half a dozen kinds for a broken file
        raise ValueError(
            f"{path} cannot be read as a base learner ({type(error).__name__}); is it whole?"
        ) from error
    if header is None:
        state, header = _of_the_original(path, state, source)
    classes = class_roles(*source.classes(fold), selection).train
    run = {"data": source.name, "backbone": backbone_name, "dilations": dilations(model.backbone)}
    again = f"train one for it with `python train.py task=base fold={fold} selection={selection}`"
    for name, value in run.items():
        found = header.get(name)
        if found is not None and value is not None and found != value:
            raise ValueError(f"{path} was trained with {name}={found}, this run has {name}={value}; {again}")
    if header["count"] != len(classes):
        raise ValueError(
            f"{path} knows {header['count']} base classes, {source.name} has {len(classes)} to learn a fold "
            f"with selection={selection}; {again}"
        )
    if header["classes"] != list(classes) and not force:
        known = "an unknown fold" if header["fold"] is None else f"fold {header['fold']}"
        raise ValueError(
            f"{path} was trained on {known}, so it may have seen the novel classes of fold {fold}; {again}, "
            "or take it all the same with model.network.force=true"
        )
    load_exactly(model, state, path)
    return tuple(header["classes"] or classes)


def _of_the_original(
    path: Path, state: Mapping[str, Tensor], source: Source
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and header in our names, of a file that has the backbone as ``layer0`` and as ``encoder.0``."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "cls.4.bias" not in state:
        raise ValueError(f"{path} has no 'cls.4.bias'; it is no base learner of BAM")
    ours = {
        f"backbone.{key}" if key.startswith("layer") else key: value
        for key, value in state.items()
        if not key.startswith("encoder.")
    }
    splits = [part.removeprefix("split") for part in path.parts if part.startswith("split")]
    fold = next((int(split) for split in splits if split.isdecimal()), None)
    resnet = "layer1.0.conv1.weight" in state
    return ours, {
        "fold": fold,
        "classes": None if fold is None else list(source.classes(fold)[0]),
        "count": len(state["cls.4.bias"]) - 1,
        "dilations": "layer0: 1; layer1: 1; layer2: 1; layer3: 2; layer4: 4" if resnet else None,
    }

"""Callbacks of a run: fine-tuning, cached features, pictures, singular values, progress."""

import logging
from collections.abc import Callable, Mapping, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor, nn

from svf_lightning.backbones.feature_cache import remember_features
from svf_lightning.episode import Episode
from svf_lightning.files import replace_file
from svf_lightning.progress import Progress
from svf_lightning.svf.network import singular_values

log = logging.getLogger("svf")


class Finetune(Callback):
    """Make the backbone trainable in the way ``prepare`` says.

    Runs in ``setup``, which Lightning calls before it restores a checkpoint and before it builds
    optimizers. So resuming finds the factored layers in place, and the optimizer sees only what
    is left trainable.

    Args:
        prepare: Changes a backbone in place; calling it again must change nothing.
    """

    def __init__(self, prepare: Callable[[nn.Module], None]) -> None:
        self.prepare = prepare

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        self.prepare(model.backbone)
        if stage == "fit" and trainer.is_global_zero:
            count = count_trainable(model)
            log.info(f"{count['backbone']:,} numbers train in the backbone, {count['head']:,} in the head")


class StopAtNonFinite(Callback):
    """Stop at the first loss that is NaN or infinite, before it reaches any weight.

    Runs in ``on_before_backward``. What last.ckpt holds is from before, and stays.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not loss.isfinite().all():
            rates = ", ".join(f"{group['lr']:.3g}" for group in trainer.optimizers[0].param_groups)
            step, epoch = trainer.global_step, trainer.current_epoch + 1
            raise ValueError(
                f"the loss is {loss.item()} at step {step} (epoch {epoch}) with learning rates {rates}, "
                "so training stops: try a lower model.lr, +trainer.gradient_clip_val=1, or "
                "trainer.precision=32-true; resume=last goes on from the last save before it"
            )


class TakeNewRecipe(Callback):
    """Let rates, decay and schedule of today's configuration hold for a resumed training.

    Runs in ``on_train_start``, after Lightning has put the optimizer's and the scheduler's old ones back.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fresh: Any = pl_module.configure_optimizers()
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        groups = trainer.optimizers[0].param_groups
        for group, new in zip(groups, fresh["optimizer"].param_groups, strict=True):
            group.update({name: value for name, value in new.items() if name != "params"})
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


class LogHyperparameters(Callback):
    """Tell every logger the whole configuration, and how many numbers train.

    Runs in ``on_fit_start``, when the fine-tune strategy has been applied.

    Args:
        configuration: Plain values.
    """

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self.configuration = configuration

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        for logger in trainer.loggers:
            logger.log_hyperparams({**self.configuration, "trainable": count_trainable(model)})


def count_trainable(model: nn.Module) -> dict[str, int]:
    """How many numbers train in the backbone and in the head, and how many there are in all."""
    backbone = {id(p) for p in model.get_submodule("backbone").parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "backbone": sum(p.numel() for p in trainable if id(p) in backbone),
        "head": sum(p.numel() for p in trainable if id(p) not in backbone),
        "all": sum(p.numel() for p in model.parameters()),
    }


class AfterSteps(Callback):
    """Do something to the backbone after every few optimizer steps, such as bounding its weights.

    Runs in ``on_train_batch_end``, the first hook behind the optimizer's step, and counts steps rather
    than batches, which differ where gradients are accumulated.

    Args:
        function: Changes a backbone in place.
        every: Number of steps, 1 or more. Counted from the start of the training, across resumes.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, function: Callable[[nn.Module], None], every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more optimizer steps, got {every}")
        self.function, self.every = function, every
        self.seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.seen:
            self.seen = trainer.global_step
            if self.seen % self.every == 0:
                model: Any = pl_module.model
                self.function(model.backbone)


class SpectraLog(Callback):
    """Write the singular values of every factored layer, epoch by epoch, to ``spectra.npz`` of the run.

    Runs in ``on_train_start``, where the values are those of the pretrained weights or of the checkpoint that
    is resumed, and in ``on_train_epoch_end``. What the file holds is told in ``analysis/spectra.py``. A
    resumed run goes on with the file as far as its checkpoint goes. A run without factored layers leaves no
    file.

    Args:
        every: Number of epochs between two entries, 1 or more. The last epoch is always written.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more epochs, got {every}")
        self.every = every
        self.epochs: list[int] = []
        self.values: dict[str, list[np.ndarray]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "spectra.npz"
        self.epochs, self.values = [], {}
        if trainer.current_epoch > 0 and path.is_file():
            with np.load(path) as file:
                kept = file["epochs"] <= trainer.current_epoch
                self.epochs = file["epochs"][kept].tolist()
                self.values = {name: list(file[name][kept]) for name in file.files if name != "epochs"}
        self._write(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every == 0 or done == trainer.max_epochs:
            self._write(trainer, pl_module, done)

    def _write(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        model: Any = pl_module.model
        values = singular_values(model.backbone)
        if not values or not trainer.is_global_zero:
            return
        if epoch not in self.epochs:
            self.epochs.append(epoch)
            for name, value in values.items():
                self.values.setdefault(name, []).append(value.float().cpu().numpy())

        def write(path: Path) -> None:
            with path.open("wb") as file:  # np.savez would add an ending to a name
                np.savez(file, epochs=self.epochs, **self.values)  # type: ignore[arg-type]

        replace_file(Path(trainer.default_root_dir) / "spectra.npz", write)


class RememberFeatures(Callback):
    """Compute the backbone's features of an image once per validation or test, not once per episode.

    Begins and ends with each of them, since training changes the weights in between.

    Args:
        megabytes: Of features to keep, where the network is. An image of 473 pixels has 70 in a ResNet-50.
    """

    def __init__(self, megabytes: int = 2048) -> None:
        self.megabytes = megabytes
        self.context = ExitStack()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        self.cache = self.context.enter_context(remember_features(model.backbone, self.megabytes))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.cache.episode = batch[0]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.context.close()

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_test_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.context.close()


class EpisodePictures(Callback):
    """Keep the first test episodes with their predictions, for a picture grid.

    Runs in ``on_test_batch_end``, where the predicted masks arrive; draws nothing itself.

    Args:
        count: How many episodes to keep.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self.kept: list[tuple[Episode, Tensor, Tensor]] = []  # (episode, truth, predicted mask)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        episodes, labels = batch
        for i, (label, mask) in enumerate(zip(labels, outputs["masks"], strict=True)):
            if len(self.kept) < self.count:
                episode = Episode(*(None if field is None else field[i].cpu() for field in episodes))  # type: ignore[arg-type]
                self.kept.append((episode, label.cpu(), mask.cpu()))


class EpisodeProgress(ProgressBar):
    """Show episodes per second and the time left; plain lines where there is no terminal.

    Args:
        unit: What a batch holds, in the plural.
    """

    def __init__(self, unit: str = "episodes") -> None:
        super().__init__()
        self.unit = unit
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:  # Lightning calls it on every process but the first
        self.enabled = False

    def start(self, text: str, total: float) -> None:
        self.stop()
        if self.enabled:
            self.bar = Progress(text, total=int(total) if total != float("inf") else None, unit=self.unit)

    def advance(self, batch: Any, note: str = "") -> None:
        if self.bar is not None:
            first = batch  # a batch begins with its images, be it an Episode or a pair that begins with one
            while not isinstance(first, Tensor):
                first = first[0]
            self.bar.advance(len(first), note)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = _count(trainer.train_dataloader, self.total_train_batches)
        self.start(f"train, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}", total)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.advance(batch, f"loss {outputs['loss'].item():.3f}" if batch_idx % 10 == 0 else "")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()
        if not trainer.sanity_checking:
            self.start("validate", _count(trainer.val_dataloaders, sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.advance(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start("test", _count(trainer.test_dataloaders, sum(trainer.num_test_batches)))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.advance(batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start("predict", _count(trainer.predict_dataloaders, sum(trainer.num_predict_batches)))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.advance(batch)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()


def _count(loader: Any, batches: float) -> float:
    """How many items a loader gives in so many batches, as far as it knows; infinity where it does not."""
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None:
        return float("inf")
    whole = len(sampler) if isinstance(sampler, Sized) else float("inf")
    return min(batches * size, whole)

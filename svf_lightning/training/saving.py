"""Save the state of a training: after every epoch, now and then within one, and when told to stop."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Stopped(Exception):  # noqa: N818  (not a failure)
    """A signal asked the training to stop, and its state is in last.ckpt."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class RunCheckpoint(ModelCheckpoint):
    """Write last.ckpt after every epoch, every few minutes within one, and on a signal; and best.ckpt.

    Lightning saves its own "last" only beside another save, so a run that chooses nothing would have none
    before its end. A new file is written beside the old one and renamed: at any moment one of them is whole.
    SIGTERM, SIGUSR1 and Ctrl-C are answered after the step or the validation that they come in; Ctrl-C a
    second time stops at once.

    Args:
        folder: Where they go.
        selection: "last" chooses nothing; anything else keeps the weights with the highest ``monitor`` in
            best.ckpt.
        monitor: A logged score.
        minutes: Between two saves within an epoch; None saves between epochs only.
    """

    def __init__(
        self,
        folder: str | Path,
        selection: str,
        monitor: str = "val/miou",
        minutes: float | None = 10,
    ) -> None:
        chooses = selection != "last"
        super().__init__(
            folder,
            filename="best",
            monitor=monitor if chooses else None,
            mode="max",
            save_top_k=int(chooses),
            enable_version_counter=False,
        )
        self.last, self.minutes = Path(folder) / "last.ckpt", minutes
        self.written = time.monotonic()
        self.signal: int | None = None  # that asked to stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best weights of this folder; the path of another run's is of no use here."""
        super().load_state_dict(state_dict)
        if self.best_model_path and Path(self.best_model_path).parent.resolve() != self.last.parent.resolve():
            self.best_model_path = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.written = time.monotonic()
        for number in SIGNALS:  # Lightning's own handlers stop without saving
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == number:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        late = self.minutes is not None and time.monotonic() - self.written > 60 * self.minutes
        if self._asked(trainer) or (late and trainer.world_size == 1):  # clocks of processes differ
            self.write_last(trainer)
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.write_last(trainer)
        self._stop(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.max_epochs == 0:  # a run that trains nothing can be tested again, too
            self.write_last(trainer)

    def write_last(self, trainer: Trainer) -> None:
        """Put the present state into last.ckpt."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        part = self.last.with_name("last.ckpt.part")
        trainer.save_checkpoint(part, weights_only=False)
        if trainer.is_global_zero:
            part.replace(self.last)
        trainer.strategy.barrier()
        self.written = time.monotonic()

    def _asked(self, trainer: Trainer) -> bool:
        """Whether any process has been told to stop."""
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)

    def _stop(self, trainer: Trainer) -> None:
        if self._asked(trainer):
            raise Stopped(self.signal or signal.SIGTERM)

"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

PLAIN_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Count finished items, and say how many a second and how long it still takes.

    Args:
        text: What is being done.
        total: Number of items, if known.
        unit: What an item is called, in the plural.
        transient: Leave nothing in view at the end. So quick work says nothing at all off a terminal.
        interval: Seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        text: str,
        total: int | None = None,
        unit: str = "items",
        *,
        transient: bool = False,
        interval: float = PLAIN_LINE_EVERY,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.text, self.total, self.unit = text, total, unit
        self.transient, self.interval = transient, interval
        self.done, self.note = 0, ""
        self.started = self.last_line = time.monotonic()
        console = Console(stderr=True)
        self.bar: RichProgress | None = None
        if console.is_terminal:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            note_column = TextColumn("{task.fields[note]}")
            self.bar = RichProgress(*columns, note_column, console=console, transient=transient)
            self.task = self.bar.add_task(text, total=total, note="")
            self.bar.start()
        self.console = console

    @property
    def speed(self) -> float:
        """Items per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def advance(self, items: int = 1, note: str = "") -> None:
        """Report ``items`` more as finished; ``note`` stays in view until the next one."""
        self.done += items
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(
                self.task, completed=self.done, note=f"{self.speed:.1f} {self.unit}/s  {self.note}"
            )
        elif time.monotonic() - self.last_line >= self.interval:
            self.last_line = time.monotonic()
            left = f", {(self.total - self.done) / self.speed:.0f} s left" if self.total else ""
            of = f" of {self.total}" if self.total else ""
            self.say(f"{self.done}{of} {self.unit}, {self.speed:.1f}/s{left}")

    def say(self, state: str) -> None:
        self.console.print(
            f"{self.text}: {state}{f', {self.note}' if self.note else ''}", highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        """Leave the last state in view, unless transient."""
        if self.bar is not None:
            self.bar.stop()
        elif not self.transient:
            self.say(
                f"{self.done} {self.unit} in {time.monotonic() - self.started:.1f} s, {self.speed:.1f}/s"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(
    items: Iterable[T],
    text: str,
    total: int | None = None,
    unit: str = "items",
    *,
    interval: float = PLAIN_LINE_EVERY,
) -> Iterator[T]:
    """Yield ``items`` while showing how far they have come; nothing stays in view when all are done."""
    with Progress(text, total, unit, transient=True, interval=interval) as progress:
        for item in items:
            yield item
            progress.advance()

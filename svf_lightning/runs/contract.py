"""What may change when a run is resumed: compared with the configuration that its folder records."""

import fnmatch
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from svf_lightning.runs.configuration import Config, load_config

log = logging.getLogger("svf")

# Free to change: nothing of them is in the weights. All else defines the run.
FREE = (
    *(
        "resume",
        "resume_changes",
        "init_from",
        "trust",
        "skip_done",
        "test",
        "workers",
        "data_dir",
        "weights_dir",
    ),
    *("run_dir", "run_name", "names", "names.*", "logger", "logger.*", "callbacks", "callbacks.*"),
    *("data.workers", "data.source.root", "data.val_episodes", "data.test_episodes", "data.test_batch_size"),
    *("data.episode_seed", "data.episode_list", "backbone.weights", "model.network.base"),
    *("model.network.backbone.weights", "model.network.source.root", "trainer.*"),
)
# Of what is free by the above, this is not: it changes what a step does.
NOT_FREE = (
    *("trainer.accumulate_grad_batches", "trainer.gradient_clip_*", "trainer.limit_train_batches"),
    *("trainer.overfit_batches", "callbacks.*.function", "callbacks.*.function.*", "callbacks.*.every"),
)
# Said once, under another name.
COPIES = (
    "model.network.backbone.*",
    "callbacks.finetune.*",
    "callbacks.spectra.*",
    "data.selection",
    "data.fold",
)
LENGTHS = ("epochs", "model.epochs", "base.epochs")  # may grow
# What weights and the optimizer's state are made for: no insisting helps.
STRUCTURE = (
    *("data", "model", "backbone", "finetune"),
    *("model.network.*", "model.optimizer", "model.separate*", "backbone.*", "finetune.*", "base.*"),
)


class Change(NamedTuple):
    """A value that differs, by its dotted name."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.old!r} in the run and {self.new!r} now"


def check_resume(config: Config, resume: Path) -> list[Change]:
    """Compare a new configuration with that of the run whose checkpoint is resumed. Writes nothing.

    Args:
        config: The new one; ``resume_changes`` "refuse" or "allow".
        resume: The checkpoint, in the ``checkpoints`` folder of its run.

    Returns:
        Changes of the training that were allowed; those that are always free are only told.

    Raises:
        ValueError: Naming every change that is refused, with both values.
    """
    folder = resume.parent.parent
    if not (folder / "config.yaml").is_file():
        log.warning("%s lies in no run folder, so it cannot be compared with this configuration", resume)
        return []
    changes = differences(load_config(folder), config)
    free = [change for change in changes if _is_free(change)]
    defining = [change for change in changes if change not in free]
    insists = config.get("resume_changes") == "allow"
    stuck = [change for change in defining if not insists or _matches(change.name, STRUCTURE)]
    if stuck:
        told = "; ".join(map(str, stuck))
        remedy = "start a new run, with init_from=RUN to begin with its weights"
        if not any(_matches(change.name, STRUCTURE) for change in stuck):
            remedy += ", or insist with resume_changes=allow"
        raise ValueError(f"resume cannot change what defines {folder}: {told}; {remedy}")
    for change in free:
        if not change.name.startswith(("names", "resume", "run_")):
            log.info("resume: %s, applied", change)
    for change in defining:
        log.warning("resume: %s, applied as you insist", change)
    lengths = [change for change in free if change.name in LENGTHS]
    return [*defining, *lengths]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every value that differs between two configurations, but for copies of other values."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    # Of another choice, such as finetune=frozen, the choice is told and not all that comes with it.
    groups = ("data", "model", "backbone", "finetune")
    chosen = {group: (before.get(f"names.{group}"), after.get(f"names.{group}")) for group in groups}
    others = {group: pair for group, pair in chosen.items() if pair[0] != pair[1]}
    return [Change(name, *pair) for name, pair in others.items()] + [
        Change(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not _matches(name, COPIES)
        and name.split(".")[0] not in others
    ]


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Plain values by dotted name; a list counts as one value, and an empty mapping as None."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
        if not node:
            yield path, None
    else:
        yield path, node


def _is_free(change: Change) -> bool:
    if change.name in LENGTHS:
        return change.old is not None and change.new is not None and change.new >= change.old
    return _matches(change.name, FREE) and not _matches(change.name, NOT_FREE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

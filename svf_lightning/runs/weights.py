"""Begin a run with the weights of another one, whatever its strategy, data set or number of classes."""

import logging
from collections.abc import Sequence
from pathlib import Path

from svf_lightning.runs.export import merge
from svf_lightning.runs.run import load_run
from svf_lightning.training.segmenter import FewShotSegmenter

log = logging.getLogger("svf")


def init_from(segmenter: FewShotSegmenter, source: str | Path, trust: Sequence[str] = ()) -> None:
    """Take every tensor of another run's network that has the same name and shape here.

    What that run's strategy did is folded into plain layers first. No state of its optimizer is taken.

    Args:
        segmenter: Filled in place; its fine-tune strategy is not applied yet.
        source: A run's folder, or a checkpoint of one.
        trust: Modules that the run may call, beside those of this package.

    Raises:
        FileNotFoundError: If there is no such run or file.
        ValueError: If not a single tensor fits.
    """
    path = Path(source)
    if path.is_dir():
        other = load_run(path, classes=(1,), trust=trust)[1]
    else:
        other = FewShotSegmenter.load_from_checkpoint(path, trust=trust)
    merge(other.model.backbone)
    theirs, ours = other.model.state_dict(), segmenter.model.state_dict()
    taken = {
        name: value for name, value in theirs.items() if name in ours and value.shape == ours[name].shape
    }
    if not taken:
        raise ValueError(f"init_from={source}: none of its {len(theirs)} tensors fits this network")
    segmenter.model.load_state_dict(taken, strict=False)
    log.info("init_from=%s: took %s of %s tensors", source, len(taken), len(ours))
    for what, names in (
        ("have another shape there", [name for name in ours if name in theirs and name not in taken]),
        ("are not there", [name for name in ours if name not in theirs]),
        ("are not here", [name for name in theirs if name not in ours]),
    ):
        if names:
            log.info(
                "  %s %s: %s", len(names), what, ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            )

"""Few-shot segmentation with singular value fine-tuning.

What most people import is here. A name loads its room when it is first used, so that importing the package
itself takes no time and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from svf_lightning.data.datamodule import FewShotDataModule
    from svf_lightning.own_images.predict import FewShotPredictor
    from svf_lightning.runs.official import from_official
    from svf_lightning.runs.run import load_run
    from svf_lightning.svf.network import apply_svf, load_svf_state_dict, merge_svf, svf_state_dict
    from svf_lightning.training.segmenter import FewShotSegmenter

__all__ = [
    "FewShotDataModule",
    "FewShotPredictor",
    "FewShotSegmenter",
    "apply_svf",
    "from_official",
    "load_run",
    "load_svf_state_dict",
    "merge_svf",
    "svf_state_dict",
]

_HOMES = {
    "FewShotDataModule": "data.datamodule",
    "FewShotPredictor": "own_images.predict",
    "FewShotSegmenter": "training.segmenter",
    "apply_svf": "svf.network",
    "from_official": "runs.official",
    "load_run": "runs.run",
    "load_svf_state_dict": "svf.network",
    "merge_svf": "svf.network",
    "svf_state_dict": "svf.network",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Turn an official checkpoint into a run folder, as if train.py had trained it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from svf_lightning.backbones.backbone import dilations
from svf_lightning.backbones.weights import load_exactly, read_state_dict
from svf_lightning.files import replace_file
from svf_lightning.models.bam import BAM
from svf_lightning.runs.configuration import compose, write_config
from svf_lightning.runs.official import from_official
from svf_lightning.runs.run import build_part, build_segmenter
from svf_lightning.svf.network import merge_svf

# Per method: its choice of `model`, the dilation of a ResNet, and what else the official code has of its own.
_CHOICES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "baseline": ("baseline", "torchvision", ()),
    "pfenet": ("pfenet", "uniform", ()),
    "svf_pfenet": ("pfenet", "torchvision", ()),
    "bam": ("bam", "uniform", ("model.network.base=null",)),
    "svf_bam": ("bam", "uniform", ("model.network.base=null",)),
    "cyctr": ("cyctr", "torchvision", ("model.network.sampling=official",)),
    "hsnet": ("hsnet", "none", ()),
}


def convert(
    method: str,
    checkpoint: Path,
    folder: Path,
    *,
    backbone: str = "resnet50",
    fold: int = 0,
    shot: int = 1,
    data: str = "pascal",
    overrides: Sequence[str] = (),
) -> None:
    """Write a run folder with an official checkpoint's weights, for evaluate.py and ``svf predict``.

    Nothing in an official file says its fold or data set, so what is claimed here has to be right: a wrong
    fold tests classes that the network was trained on.

    Args:
        method: As :func:`from_official` calls them, without "bam_base", which is no method.
        checkpoint: The official file.
        folder: The run folder, which must not be one yet.
        backbone: "resnet50", "resnet101" or "vgg16".
        fold: Of the checkpoint.
        shot: Supports per episode that it was trained for.
        data: The data set that it was trained on; a choice of conf/data.
        overrides: Further ones, as train.py takes them, such as "data_dir=/data".

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the folder is taken, the method unknown, or the file holds something else.
    """
    if method not in _CHOICES:
        raise ValueError(f"method must be one of {', '.join(_CHOICES)}; got {method!r}")
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds a run already; name another folder")
    state = read_state_dict(checkpoint, f"an official checkpoint of {method}")
    model = from_official(method, state, backbone=backbone, shot=shot)

    name, dilation, more = _CHOICES[method]
    factored = any(key.endswith(".vector_S") for key in state)
    for frozen in ("layer0", "layer1"):  # factored officially, though they never train
        merge_svf(model.get_submodule(f"backbone.{frozen}"))
    own = f"[{','.join(model.own_stages)}]" if isinstance(model, BAM) else None
    config = compose(
        [
            *(f"model={name}", f"data={data}", f"backbone={backbone}", f"fold={fold}", f"shot={shot}"),
            *(f"finetune={'svf' if factored else 'frozen'}", "recipe=paper", "backbone.weights=null"),
            *_backbone_options(method, backbone, dilation),
            *([f"model.network.own_stages={own}"] if own else []),
            *more,
            *overrides,
        ],
        folder,
    )
    base, novel = build_part(config, "data.source").classes(fold)
    if isinstance(model, BAM) and len(model.base_classes) != len(base):
        raise ValueError(
            f"{checkpoint} knows {len(model.base_classes)} base classes, data={data} has {len(base)} a fold; "
            "name the data set that it was trained on"
        )
    segmenter = build_segmenter(config, novel)
    build_part(config, "finetune")(segmenter.model.backbone)
    ours, theirs = dilations(segmenter.model.backbone), dilations(model.get_submodule("backbone"))
    if ours != theirs:
        raise ValueError(
            f"{method} has dilations {theirs}, the configuration {ours}; leave backbone.dilation"
        )
    load_exactly(segmenter.model, model.state_dict(), checkpoint)
    content = {"state_dict": segmenter.state_dict(), "svf_lightning": segmenter.identity}
    (folder / "checkpoints").mkdir(parents=True)
    replace_file(folder / "checkpoints" / "last.ckpt", lambda temporary: torch.save(content, temporary))
    write_config(folder, config)


def _backbone_options(method: str, backbone: str, dilation: str) -> list[str]:
    if backbone == "vgg16":
        return ["backbone.batch_norm=false", "backbone.ceil_mode=false"] if method == "hsnet" else []
    stem = "plain" if method == "hsnet" else "deep"
    return [f"backbone.dilation={dilation}", f"backbone.stem={stem}"]

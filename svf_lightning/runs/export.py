"""Export a run: as plain weights, as a kilobyte file of singular values, or as an ONNX model."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svf_lightning.episode import Episode
from svf_lightning.files import replace_file
from svf_lightning.finetune import lora
from svf_lightning.runs.configuration import Config, load_config, write_config
from svf_lightning.runs.run import build_part, build_segmenter, check_run, identity, load_run
from svf_lightning.svf import files as singular_files
from svf_lightning.svf.layer import SVFLayer
from svf_lightning.svf.network import merge_svf

# Of ONNX and PyTorch, which add up in different orders; in units of the largest logit, or of 1.
AGREEMENT = 1e-4


def merge_run(run: Path, out: Path, trust: str | Sequence[str] = ()) -> int:
    """Write a run folder with plain layers where the run has factors: no trace of the strategy is left.

    The new folder is one for evaluate.py and ``svf predict``; it predicts what the run does. Its checkpoint
    is ``checkpoints/last.ckpt``, with the network's tensors under ``state_dict`` as ``model.*``.

    Args:
        run: A finished run's folder.
        out: The new folder, which must not be a run yet.
        trust: Modules that the run's configuration may call, beside the parts of a run in this package.

    Returns:
        How many layers were folded.

    Raises:
        FileNotFoundError: If ``run`` is no finished run.
        ValueError: If ``out`` is taken, or the run wants to call code that is not trusted.
    """
    config, segmenter = load_run(run, trust=trust)
    folded = merge(segmenter.model.backbone)
    _write_run(out, config, segmenter)
    return folded


def merge(backbone: nn.Module) -> int:
    """Fold the layers of whatever strategy prepared a backbone into plain ones, in place; count them."""
    modules = list(backbone.modules())
    parametrized = [module for module in modules if parametrize.is_parametrized(module)]
    adapted = [module for module in modules if type(module).__module__.startswith("peft.tuners.lora")]
    folded = sum(isinstance(module, SVFLayer) for module in modules) + len(parametrized)
    with torch.no_grad():
        for module in parametrized:
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    merge_svf(backbone)
    if adapted:
        lora.merge(backbone)
    return folded + sum(hasattr(module, "merge") for module in adapted)


def export_singular_values(
    run: Path, out: Path, head: bool = False, trust: str | Sequence[str] = ()
) -> singular_files.SingularValues:
    """Write what a run trained in its backbone as a kilobyte file.

    Args:
        run: A finished run's folder.
        out: The file, usually ``*.safetensors``.
        head: Take the head along, megabytes of it. Then :func:`restore_run` needs nothing but this file
            and the base weights.
        trust: As for :func:`merge_run`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If ``run`` is no finished run.
        ValueError: If the run has no singular values, trained more than a kilobyte file holds, or wants to
            call code that is not trusted.
    """
    config, segmenter = load_run(run, trust=trust)
    original = load_config(run)
    about = {
        "identity": identity(config),
        "weights": str(original["backbone"].get("weights")),
        **({"config": original} if head else {}),
    }
    values = singular_files.collect(segmenter.model, head=head, about=about)
    singular_files.write(out, values)
    return values


def restore_run(file: Path, out: Path, trust: str | Sequence[str] = ()) -> None:
    """Build a run folder from a kilobyte file with a head, on the base weights that its run started from.

    Args:
        file: Written with the head.
        out: The new folder, which must not be a run yet.
        trust: Modules that the file's configuration may call, beside the parts of a run in this package.

    Raises:
        FileNotFoundError: If the file or the base weights are missing.
        ValueError: If the file has no head, the base weights are others, ``out`` is taken, or the file wants
            to call code that is not trusted.
    """
    values = singular_files.read(file)
    config: Config | None = values.about.get("config")
    if not isinstance(config, dict) or not values.head:
        raise ValueError(
            f"{file} holds a backbone alone; export with --with-head, or load it with "
            "svf_lightning.svf.files.load into a backbone of your own"
        )
    check_run(config, str(file), trust)
    segmenter = build_segmenter(config, build_part(config, "data.source").classes(config["fold"])[1])
    build_part(config, "finetune")(segmenter.model.backbone)
    singular_files.load(segmenter.model, values)
    merge(segmenter.model.backbone)
    _write_run(out, config, segmenter)


def _write_run(folder: Path, config: Mapping[str, Any], segmenter: Any) -> None:
    """A run folder for a merged segmenter: its strategy leaves the backbone as it is."""
    if (folder / "config.yaml").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds a run already; name another folder")
    frozen = {"_target_": "svf_lightning.finetune.frozen.prepare", "_partial_": True}
    content = {"state_dict": segmenter.state_dict(), "svf_lightning": segmenter.identity}
    (folder / "checkpoints").mkdir(parents=True)
    replace_file(folder / "checkpoints" / "last.ckpt", lambda temporary: torch.save(content, temporary))
    write_config(folder, {**config, "finetune": frozen, "callbacks": {}, "run_dir": str(folder)})


class Exported(nn.Module):
    """A method as a function of tensors: ``(support images, support masks, query) -> logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, support_images: Tensor, support_masks: Tensor, query: Tensor) -> Tensor:
        """Segment queries.

        Args:
            support_images: Normalised, shape ``(B, K, 3, H, W)``.
            support_masks: 0 background, 1 the class, 255 ignored; long, shape ``(B, K, H, W)``.
            query: Normalised, shape ``(B, 3, H, W)``.

        Returns:
            Logits ``(B, 2, H, W)`` of background and foreground.
        """
        unknown = torch.zeros_like(query[:, 0], dtype=torch.long)  # (B, H, W): no method looks at it here
        episode = Episode(query, unknown, support_images, support_masks, unknown[:, 0, 0])
        return self.model(episode).logits


def export_onnx(run: Path, out: Path, trust: str | Sequence[str] = ()) -> float:
    """Write a run as an ONNX model and compare the two on batches of 1 and 3 episodes.

    Inputs are ``support_images``, ``support_masks`` and ``query``, the output ``logits``, as in
    :class:`Exported`. The number of episodes is free; the number of supports and the size of the images are
    those of the run, to which pictures are brought by resizing the longer side and padding at the bottom or
    the right.

    Args:
        run: A finished run's folder.
        out: The file.
        trust: As for :func:`merge_run`.

    Returns:
        The largest difference of two logits, in units of the largest logit (at least 1).

    Raises:
        FileNotFoundError: If ``run`` is no finished run.
        ValueError: If the extra is not installed, PyTorch and onnxruntime do not agree, or the run wants to
            call code that is not trusted.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}; pip install 'svf-lightning[export]'") from None
    config, segmenter = load_run(run, trust=trust)
    model = Exported(copy.deepcopy(segmenter.model)).eval().requires_grad_(False)
    merge(model.model.backbone)  # type: ignore[arg-type]
    shot, size = config["shot"], config["data"]["image_size"]

    names = ("support_images", "support_masks", "query")
    # Strict, because the methods say len(tensor), which fixes the number of episodes otherwise. AUTO lets
    # torch find the range; that 1 and 3 episodes are in it is seen below.
    program = torch.export.export(
        model,
        _episodes(2, shot, size),
        dynamic_shapes={name: {0: torch.export.Dim.AUTO} for name in names},
        strict=True,
    )
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        torch.onnx.export(
            program,
            (),
            str(temporary),
            dynamo=True,
            external_data=False,  # one file
            input_names=names,
            output_names=["logits"],
            verbose=False,
        )

    replace_file(out, write)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    difference = 0.0
    for episodes in (1, 3):
        given = _episodes(episodes, shot, size)
        ours = model(*given)
        theirs = torch.from_numpy(
            session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})[0]
        )
        difference = max(difference, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1)))
    if not difference <= AGREEMENT:
        out.unlink()
        raise ValueError(
            f"onnxruntime and PyTorch differ by {difference:.1e} of the largest logit, more than "
            f"{AGREEMENT:.0e}, so {out} was not kept"
        )
    return difference


def _episodes(count: int, shot: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random episodes whose masks are rectangles."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, shot + 1, 3, size, size, generator=generator)
    masks = torch.zeros(count, shot, size, size, dtype=torch.long)
    masks[:, :, size // 4 : size // 2, size // 4 : 3 * size // 4] = 1
    return images[:, 1:].contiguous(), masks, images[:, 0].contiguous()

"""`svf benchmark methods`: time and memory of a training step of each method, beside the official way.

    OMP_NUM_THREADS=1 svf benchmark methods                     # all methods, 1 and 5 shots; minutes
    OMP_NUM_THREADS=1 svf benchmark methods --method cyctr --shot 5 --side 193 --finetune frozen

The official way ("plain" in the table) is what the official codes do, with our own modules and so with the
same result; the last column says how near. It has a backbone pass for the query and one for each shot, the
prior mask image by image with the whole similarity left to autograd, attention with its whole matrix, and
HSNet once per shot. A step is loss, gradient and nothing else; the backbone is a ResNet-50 with random
weights. The time is the smallest of a few steps, in CPU seconds of the process; memory is what the process
grew by at its peak. Each cell is a process of its own.
"""

import copy
import functools
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.backbones.backbone import Backbone
from svf_lightning.backbones.resnet import resnet50
from svf_lightning.episode import Episode, Prediction
from svf_lightning.finetune import frozen, svf
from svf_lightning.models import blocks, cyctr
from svf_lightning.models.bam import BAM
from svf_lightning.models.baseline import Baseline
from svf_lightning.models.hsnet import HSNet
from svf_lightning.models.pfenet import PFENet
from svf_lightning.models.pspnet import PSPNet
from svf_lightning.training.losses import cross_entropy, cyctr_dice

METHODS = ("baseline", "pfenet", "bam", "cyctr", "hsnet")
STAGES = ("layer2", "layer3", "layer4")


def build(method: str, shots: int, plain: Backbone, tuned: Backbone) -> nn.Module:
    """A method on a fine-tuned backbone; BAM's base learner keeps a plain one."""
    if method == "bam":
        pspnet = PSPNet(plain, 15)
        learner = nn.Sequential(pspnet.ppm, pspnet.cls)
        model: Any = BAM(plain, shots, base_learner=learner, base_classes=range(6, 21), own_stages=STAGES)
        model.backbone = tuned
        return model
    classes: dict[str, Any] = {
        "baseline": Baseline,
        "pfenet": PFENet,
        "cyctr": cyctr.CyCTR,
        "hsnet": HSNet,
    }
    return classes[method](tuned, shots)


def episode(batch: int, shots: int, side: int) -> Episode:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, shots + 1, 3, side, side, generator=generator)
    masks = torch.zeros(batch, shots + 1, side, side, dtype=torch.long)
    masks[:, :, side // 4 : side // 2, side // 3 : -side // 5] = 1
    return Episode(images[:, 0], masks[:, 0], images[:, 1:], masks[:, 1:], torch.full((batch,), 6))


# -- the plain transcriptions


def pass_by_pass(
    forward: Callable[..., list[Tensor]], batch: int, images: Tensor, layer4_mask: Tensor | None = None
) -> list[Tensor]:
    """The backbone once for the queries and once for each shot."""
    count, shots = len(images), len(images) // batch - 1
    passes = [[*range(batch)]] + [[*range(batch + k, count, shots)] for k in range(shots)]
    features = [forward(images[p], None if layer4_mask is None else layer4_mask[p]) for p in passes]
    order = torch.tensor([i for indices in passes for i in indices]).argsort()
    return [torch.cat(stage)[order] for stage in zip(*features, strict=True)]


def plain_prior(query: Tensor, support: Tensor, eps: float = 1e-7) -> Tensor:
    priors = []
    shots = len(support) // len(query)
    for number, s in enumerate(support.flatten(2)):
        q = query[number // shots].flatten(1)
        norms = s.norm(dim=0)[:, None] * q.norm(dim=0)[None]
        similarity = (s.T @ q / (norms + eps)).max(dim=0).values
        low, high = similarity.min(), similarity.max()
        priors.append(((similarity - low) / (high - low + eps)).view(1, *query.shape[-2:]))
    return torch.stack(priors)


def plain_attention(self: cyctr.CycleAttention, query: Tensor, support: cyctr.SupportTokens) -> Tensor:
    q, k, v = (
        linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        for linear, tokens in (
            (self.q_fc, query),
            (self.k_fc, support.features),
            (self.v_fc, support.features),
        )
    )
    similarity = q @ k.mT / math.sqrt(q.shape[-1])  # (B, heads, N, S), kept
    consistent = cyctr.cycle_consistent(similarity, support.is_object)
    unwanted = (self.association_drop((~consistent).float()) > 0).float() + support.is_padding[:, None]
    weights = self.attn_drop((similarity - 1e4 * unwanted[:, :, None]).softmax(dim=-1))
    return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class ShotByShot(nn.Module):
    """HSNet's test: the whole network again for every shot."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, episode: Episode) -> Prediction:
        shots = episode.support_masks.unsqueeze(2).unbind(1)
        images = episode.support_images.unsqueeze(2).unbind(1)
        logits = [
            self.model(episode._replace(support_images=i, support_masks=m)).logits
            for i, m in zip(images, shots, strict=True)
        ]
        return Prediction(torch.stack(logits).mean(dim=0))


def transcribe(method: str, model: Any, batch: int) -> nn.Module:
    """Turn a model into its plain transcription, in place; for a process of its own."""
    if method == "hsnet":
        return ShotByShot(model)
    model.backbone.forward = functools.partial(pass_by_pass, model.backbone.forward, batch)
    blocks.prior_mask = cyctr.prior_mask = plain_prior
    cyctr.CycleAttention.forward = plain_attention  # type: ignore[method-assign]
    return model


# -- measuring


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def megabytes() -> float:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _measure(
    method: str, model: nn.Module, variant: str, task: Episode, rounds: int, send: Callable[[object], None]
) -> None:
    """Run in a fresh process: steps with the model as it is, or transcribed."""
    if variant == "plain":
        model = transcribe(method, model, len(task.query_image))
    model.train()
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.eval()  # so that both compute the same
    loss_function = cyctr_dice if method == "cyctr" else cross_entropy

    def step() -> tuple[float, Tensor]:
        torch.manual_seed(0)  # CyCTR draws tokens
        start = time.process_time()
        prediction = model(task)
        loss_function(prediction, task).backward()
        taken = time.process_time() - start
        model.zero_grad()
        return taken, prediction.logits.detach()

    before = megabytes()
    steps = [step() for _ in range(rounds + 1)]
    send((min(taken for taken, _ in steps[1:]), peak_megabytes() - before, steps[0][1].numpy()))


def _run(method: str, model: nn.Module, variant: str, task: Episode, rounds: int) -> Any:
    """CPU seconds of a step, megabytes that it took, and the logits."""
    context = multiprocessing.get_context("fork")  # shares the model, and begins with its memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(method, model, variant, task, rounds, sender.send))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise ValueError(
            f"{method}, {variant}: the process ended early; take a smaller --side or --batch"
        ) from None
    finally:
        process.join()


def run(
    methods: Sequence[str], shots: Sequence[int], side: int, batch: int, rounds: int, finetune: str
) -> Iterator[str]:
    """Measure every cell; yield the lines of a Markdown table as they come.

    Args:
        methods: Some of `METHODS`.
        shots: Numbers of supports.
        side: Of the images, in pixels.
        batch: Episodes in a step.
        rounds: Steps to time, of which the fastest counts.
        finetune: "svf" or "frozen".

    Raises:
        ValueError: For an unknown method or strategy, or where the memory does not suffice.
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}; got {method!r}")
    if finetune not in ("svf", "frozen"):
        raise ValueError(f"--finetune must be svf or frozen, got {finetune!r}")
    prepare = svf.prepare if finetune == "svf" else frozen.prepare
    yield (
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), ResNet-50, {finetune}, "
        f"{batch} x {side} x {side}, best of {rounds}"
    )
    yield "| method | shots | plain s | ours s | ratio | plain MB | ours MB | ratio | gap of the logits |"
    yield "|---|---|---|---|---|---|---|---|---|"
    backbones: dict[bool, tuple[Backbone, Backbone]] = {}
    for method in methods:
        own = method == "hsnet"  # it wants another ResNet
        if own not in backbones:
            torch.manual_seed(0)
            plain = resnet50(stem="plain", dilation="none") if own else resnet50()
            backbones[own] = plain, copy.deepcopy(plain)
            prepare(backbones[own][1])
        for shot in shots:
            torch.manual_seed(0)
            model = build(method, shot, *backbones[own])
            task = episode(batch, shot, side)
            (s0, m0, l0), (s1, m1, l1) = (_run(method, model, v, task, rounds) for v in ("plain", "ours"))
            gap = abs(l1 - l0).max() / abs(l0).max()
            yield (
                f"| {method} | {shot} | {s0:.2f} | {s1:.2f} | {s1 / s0:.2f} | {m0:.0f} | {m1:.0f} | "
                f"{m1 / m0:.2f} | {gap:.0e} |"
            )

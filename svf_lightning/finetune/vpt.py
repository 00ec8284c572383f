"""Visual prompt tuning: learned tokens beside the image's; the vision transformer itself stays frozen.

Source:
    Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119 (deep and shallow variants, uniform
    initialisation). Sun et al., NeurIPS 2022, arXiv:2206.06122, compare it with SVF in words only. Written
    after the text. A prompt takes part in attention from the first step, so that, unlike every other
    strategy here, VPT as published changes what the backbone computes before it is trained. ``gate`` is
    ours: it weighs the prompts in the softmax, starts at a millionth, and trains.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svf_lightning.finetune.layers import in_stages

GATE = 1e-6  # small enough to change nothing, and still a number whose logarithm can be moved


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    count: int = 10,
    deep: bool = True,
    gate: bool = False,
    seed: int = 0,
) -> None:
    """Train prompt tokens at the blocks of some stages of a vision transformer, and nothing else.

    Blocks keep their names; they gain the parameters ``prompts`` and ``prompt_gate``. The prompts are
    removed behind the blocks that they enter, so features and later stages never see them.

    Args:
        backbone: Made of timm's vision transformer blocks; changed in place; calling again changes nothing.
        stages: Names of its submodules.
        count: Number of prompts.
        deep: New prompts at every block, as in VPT-Deep. Otherwise they enter at the first block, and what
            has become of them leaves with the last one.
        gate: Start exactly at the frozen backbone.
        seed: Of the prompts.

    Raises:
        ValueError: If a stage does not exist or holds no transformer block.
    """
    from timm.models.vision_transformer import Block

    blocks: list[Any] = []
    for stage, modules in in_stages(backbone, stages).items():
        found = [module for module in modules.values() if isinstance(module, Block)]
        if not found:
            raise ValueError(
                f"stages: {stage!r} holds no vision transformer block, which vpt needs; "
                "leave it out, or take backbone=timm with a ViT"
            )
        blocks += found
    if not any(hasattr(block, "prompt_count") for block in blocks):
        generator = torch.Generator().manual_seed(seed)
        reach = math.sqrt(6 / (3 * backbone.strides[0] ** 2 + backbone.channels[0]))  # type: ignore[index]
        for i, block in enumerate(blocks):
            block.prompt_count = count
            block.prompts_enter, block.prompts_leave = deep or i == 0, deep or i == len(blocks) - 1
            weight = block.norm1.weight
            if block.prompts_enter:
                prompts = torch.empty(count, len(weight)).uniform_(-reach, reach, generator=generator)
                block.prompts = nn.Parameter(prompts.to(weight))  # (P, C)
            block.prompt_gate = nn.Parameter(weight.new_full((1,), GATE)) if gate else None
            block.register_forward_pre_hook(_enter, with_kwargs=True)
            block.register_forward_hook(_leave)
    backbone.requires_grad_(False)
    for block in blocks:
        for name, parameter in block.named_parameters(recurse=False):
            parameter.requires_grad_(name.startswith("prompt"))


def _enter(block: Any, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Put the prompts before the tokens ``(N, T, C)`` of a block."""
    x = inputs[0]
    if block.prompts_enter:
        x = torch.cat([block.prompts.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # (N, P + T, C)
    if block.prompt_gate is not None:
        # A logarithm added before the softmax is a factor behind it. Its sign has no meaning.
        weight = block.prompt_gate.abs().clamp_min(1e-30).log().expand(block.prompt_count)
        mask = torch.cat([weight, weight.new_zeros(x.shape[1] - block.prompt_count)])
        options = {**options, "attn_mask": mask.expand(1, 1, x.shape[1], -1).to(x.dtype)}
    return (x, *inputs[1:]), options


def _leave(block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output[:, block.prompt_count :] if block.prompts_leave else output

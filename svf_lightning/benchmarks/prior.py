"""`svf benchmark prior`: time and memory of the prior mask in training, in two ways.

    OMP_NUM_THREADS=1 svf benchmark prior                       # features as at 473 pixels; a minute

One way keeps all cosines for the gradient, the other only the best of each position.

CPU seconds of the process for forward and gradient, and what the process grew by at its peak; each cell is a
process of its own, and the last column says how near the two gradients are.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from svf_lightning.benchmarks.methods import megabytes, peak_megabytes, plain_prior
from svf_lightning.models.blocks import prior_mask


def _measure(
    prior: Callable[[Tensor, Tensor], Tensor], query: Tensor, support: Tensor, send: Callable[[object], None]
) -> None:
    """Run in a fresh process."""
    before, start = megabytes(), time.process_time()
    result = prior(query, support)
    weight = torch.linspace(-1, 1, result.numel()).view_as(result)
    (result * weight).sum().backward()
    assert query.grad is not None
    send((time.process_time() - start, peak_megabytes() - before, query.grad.numpy()))


def _run(prior: Callable[[Tensor, Tensor], Tensor], query: Tensor, support: Tensor) -> Any:
    """CPU seconds, megabytes, and the gradient of the query."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(prior, query, support, sender.send))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def run(shots: Sequence[int], side: int, channels: int) -> Iterator[str]:
    """Measure both for every number of shots; yield the lines of a Markdown table as they come.

    Args:
        shots: Numbers of supports.
        side: Of the feature maps, in positions.
        channels: Of the feature maps.
    """
    yield "| shots | all kept: s | best kept: s | ratio | all kept: MB | best kept: MB | ratio | gap |"
    yield "|---|---|---|---|---|---|---|---|"
    for shot in shots:
        torch.manual_seed(0)
        query = torch.randn(1, channels, side, side).relu().requires_grad_()
        support = torch.randn(shot, channels, side, side).relu().requires_grad_()
        (s0, m0, g0), (s1, m1, g1) = (_run(prior, query, support) for prior in (plain_prior, prior_mask))
        gap = abs(g1 - g0).max() / abs(g0).max()
        yield (
            f"| {shot} | {s0:.2f} | {s1:.2f} | {s1 / s0:.2f} | {m0:.0f} | {m1:.0f} | {m1 / m0:.2f} | "
            f"{gap:.0e} |"
        )

"""Read the golden cases that lie beside this file, and rebuild their inputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svf_lightning.episode import Episode
from tests.golden import fill

FOLDER = Path(__file__).parent

# How far the gradients of singular values depend on who computed the factors. The cases store gradients but
# neither U nor V, and float32 factors of one kernel differ from one LAPACK to another where singular values
# lie close. Measured between an AMD EPYC and an Intel Xeon, torch 2.14.1: up to 2.4e-3 of a layer's
# gradient, up to 3.4e-4 of its norm; the same in float64, so it comes from the factors alone.
FACTOR_GAP = 3e-3
FACTOR_NORM_GAP = 5e-4


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON and the arrays of a case such as ``baseline/r50_1shot``."""
    arrays = FOLDER / f"{name}.npz"
    return (
        json.loads((FOLDER / f"{name}.json").read_text()),
        dict(np.load(arrays)) if arrays.exists() else {},
    )


def episode(case: dict[str, Any]) -> Episode:
    """The inputs that the official code was given."""
    inputs = case["inputs"]
    seed = inputs["seed_name"]
    query_shape, support_shape = inputs["query"]["shape"], inputs["support"]["shape"]
    query = torch.from_numpy(fill.normal(seed, "query", query_shape))
    support = torch.from_numpy(fill.normal(seed, "support", support_shape))
    size = query_shape[-2:]
    query_mask = fill.rect_mask(size, inputs["query_rects"], inputs["query_ignore_rects"])
    support_mask = fill.rect_mask(size, inputs["support_rects"], inputs["support_ignore_rects"])
    return Episode(
        query,
        torch.from_numpy(query_mask).long(),
        support,
        torch.from_numpy(support_mask).long().view(*support_shape[:2], *size),
        torch.ones(len(query), dtype=torch.long),
    )


def close(ours: torch.Tensor, stored: np.ndarray, info: dict[str, Any], gap: float) -> None:
    """Compare with a stored array, ``gap`` being relative to the largest official output."""
    scale = max(abs(info["min"]), abs(info["max"]))
    ours = torch.from_numpy(fill.subsample(ours.detach().numpy(), info["strides"]))
    torch.testing.assert_close(ours, torch.from_numpy(stored), atol=gap * scale, rtol=0)

"""The prior mask, computed some images at a time, against all cosines at once."""

import pytest
import torch

from svf_lightning.models import blocks


def transcription(query, support, eps=1e-7):
    """Image by image, all cosines at once, as the official codes do it."""
    priors = []
    for q, s in zip(query.flatten(2), support.flatten(2), strict=True):
        cosines = s.T @ q / (s.norm(dim=0)[:, None] * q.norm(dim=0)[None] + eps)
        best = cosines.max(dim=0).values
        prior = (best - best.min()) / (best.max() - best.min() + eps)
        priors.append(prior.view(1, *query.shape[-2:]))
    return torch.stack(priors)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_prior_and_gradient_are_those_of_the_whole_similarity(at_once, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "COSINES_AT_ONCE", at_once * 20 * 12)
    query = torch.randn(3, 7, 4, 5, dtype=torch.float64, requires_grad=True)
    support = torch.randn(3, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(3, 1, 3, 4) < 0.5).double()
    weight = torch.randn(3, 1, 4, 5, dtype=torch.float64)
    results = []
    for prior_mask in (blocks.prior_mask, transcription):
        prior = prior_mask(query, support * mask)
        results.append((prior, *torch.autograd.grad((prior * weight).sum(), (query, support))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_an_empty_support_gives_a_prior_of_zeros_and_a_finite_gradient():
    query, support = (torch.rand(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    prior = blocks.prior_mask(query, support * 0)
    prior.sum().backward()
    assert not prior.any()
    assert query.grad.isfinite().all()
    assert support.grad.isfinite().all()

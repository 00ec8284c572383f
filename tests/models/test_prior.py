"""The prior mask, computed some images at a time, against all cosines at once."""

import pytest
import torch

from svf_lightning.models import blocks


def transcription(query, support, eps=1e-7):
    """Support by support, all cosines at once, as the official codes do it."""
    priors = []
    shots = len(support) // len(query)
    for number, s in enumerate(support.flatten(2)):
        q = query[number // shots].flatten(1)
        cosines = s.T @ q / (s.norm(dim=0)[:, None] * q.norm(dim=0)[None] + eps)
        best = cosines.max(dim=0).values
        prior = (best - best.min()) / (best.max() - best.min() + eps)
        priors.append(prior.view(1, *query.shape[-2:]))
    return torch.stack(priors)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_prior_and_gradient_are_those_of_the_whole_similarity(at_once, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(blocks, "PAIRS_AT_ONCE", at_once * 20 * 12)
    query = torch.randn(2, 7, 4, 5, dtype=torch.float64, requires_grad=True)
    support = torch.randn(4, 7, 3, 4, dtype=torch.float64, requires_grad=True)  # two shots
    mask = (torch.rand(4, 1, 3, 4) < 0.5).double()
    weight = torch.randn(4, 1, 4, 5, dtype=torch.float64)
    results = []
    for prior_mask in (blocks.prior_mask, transcription):
        prior = prior_mask(query, support * mask)
        results.append((prior, *torch.autograd.grad((prior * weight).sum(), (query, support))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("empty", [False, True])
def test_the_gradient_is_that_of_finite_differences(empty):
    torch.manual_seed(0)
    query = torch.rand(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    support = torch.rand(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 3, 3) < 0.7).double()
    mask[0] *= not empty
    assert torch.autograd.gradcheck(lambda q, s: blocks.prior_mask(q, s * mask), (query, support))


def test_of_several_best_places_one_gets_the_gradient():
    query = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    query[0, 1, 0, 1] = 0.9  # two positions, so that something is stretched
    support = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 2).requires_grad_()
    blocks.prior_mask(query, support).mul(torch.tensor([1.0, 3.0])).sum().backward()
    assert support.grad[..., 0].any()
    assert not support.grad[..., 1].any()


def test_no_matrix_of_all_pairs_is_kept_for_the_gradient():
    query = torch.rand(1, 3, 20, 20, requires_grad=True)
    support = torch.rand(2, 3, 20, 20, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        blocks.prior_mask(query, support)
    assert max(kept) <= support.numel()
    whole = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: whole.append(t.numel()) or t, lambda t: t):
        transcription(query, support)
    assert max(whole) == 400 * 400


def test_autocast_leaves_the_prior_in_full_precision():
    torch.manual_seed(0)
    query, support = (torch.rand(2, 64, 4, 4).bfloat16().float().requires_grad_() for _ in range(2))
    expected = blocks.prior_mask(query, support)
    gradients = torch.autograd.grad(expected.square().sum(), (query, support))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            prior = blocks.prior_mask(query.to(dtype), support.to(dtype))
            torch.testing.assert_close(prior, expected)
            found = torch.autograd.grad(prior.square().sum(), (query, support))
            near = {"atol": 0.02 * gradients[0].abs().max().item(), "rtol": 0}  # bfloat16 rounds them
            torch.testing.assert_close(found, gradients, **near)


def test_an_empty_support_gives_a_prior_of_zeros_and_a_finite_gradient():
    query, support = (torch.rand(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    prior = blocks.prior_mask(query, support * 0)
    prior.sum().backward()
    assert not prior.any()
    assert query.grad.isfinite().all()
    assert support.grad.isfinite().all()

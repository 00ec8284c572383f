"""Factor a kernel into ``U diag(s) V^T``, and multiply the factors again."""

import torch
from torch import Tensor

# Relative error (Frobenius norm) up to which U diag(s) V^T counts as the weight it came from.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def decompose(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of a kernel, at full rank, one per group.

    Computed in float64 on the CPU, so that every rank of a distributed job finds the same signs.

    Args:
        weight: Kernel, shape ``(O, I / groups, ...)``.
        groups: Groups of the convolution.

    Returns:
        ``u (O, R / groups)``, ``s (R,)``, ``vh (R, I / groups * kernel positions)``, in the dtype and on
        the device of ``weight``.

    Raises:
        ValueError: If the weight holds NaN or infinity, or the factors do not give it back.

    Example:
        >>> u, s, vh = decompose(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        >>> s
        tensor([3., 2.])
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = weight.detach().to("cpu", torch.float64).reshape(groups, weight.shape[0] // groups, -1)
        if not matrix.isfinite().all():
            raise ValueError(
                "weight holds NaN or infinity, which has no singular values; load sound weights first"
            )
        if matrix.shape[2] > matrix.shape[1]:  # most kernels are wide, and then this is 2 to 4 times faster
            q, r = torch.linalg.qr(matrix.mT)
            u, s, vh = torch.linalg.svd(r.mT, full_matrices=False)
            vh = vh @ q.mT
        else:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = (t.to(weight.dtype) for t in (u.flatten(0, 1), s.flatten(), vh.flatten(0, 1)))
        again = rebuild(u.double(), s.double(), vh.double(), groups)
        error = float((again - matrix.flatten(0, 1)).norm() / matrix.norm().clamp_min(1e-300))
        if not error <= TOLERANCE[weight.dtype]:
            raise ValueError(
                f"U diag(s) V^T differs from the weight by {error:.1e} of its norm, more than "
                f"{TOLERANCE[weight.dtype]:.0e} for {weight.dtype}; leave this layer out"
            )
        # Row by row in memory, or every convolution would first copy its kernel.
        return u.contiguous().to(weight.device), s.to(weight.device), vh.contiguous().to(weight.device)


def leading(
    u: Tensor, s: Tensor, vh: Tensor, groups: int, rank: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The first ``rank`` factors of every group, and what they leave of the weight."""
    per_group = len(s) // groups
    if rank < 1 or (rank > per_group and groups == 1):
        raise ValueError(f"rank={rank} is not between 1 and {per_group}, the rank of this layer")
    if rank >= per_group:
        return u, s, vh, None
    u = u[:, :rank].contiguous()
    s = s.view(groups, -1)[:, :rank].flatten()
    vh = vh.unflatten(0, (groups, -1))[:, :rank].flatten(0, 1)
    with torch.no_grad():
        device = "cpu" if weight.device.type == "mps" else weight.device  # no float64 on Apple's GPU
        wide = [factor.to(device, torch.float64) for factor in (u, s, vh)]
        leading = rebuild(wide[0], wide[1], wide[2], groups).view(weight.shape)
        return u, s, vh, (weight.to(device, torch.float64) - leading).to(weight.device, weight.dtype)


def rebuild(u: Tensor, s: Tensor, vh: Tensor, groups: int) -> Tensor:
    """``U diag(s) V^T`` for every group, as a matrix ``(O, I / groups * kernel positions)``."""
    scaled = u.unflatten(0, (groups, -1)) * s.view(groups, 1, -1)  # (groups, O / groups, R / groups)
    return (scaled @ vh.unflatten(0, (groups, -1))).flatten(0, 1)

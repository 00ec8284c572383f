"""Convolutions with a factored kernel, whose backward passes form no gradient of kernel size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from svf_lightning.svf.decompose import rebuild

_ONEDNN = torch.backends.mkldnn.is_available()
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class FactoredConvolution(torch.autograd.Function):
    """``y = U diag(s) (V * x) + bias`` with gradients for ``x``, ``s`` and ``bias`` only.

    With ``z = V * x`` and the gradient ``g`` at the output::

        ds_r = sum_p z_r(p) (U^T g)_r(p)        dx = V^T * (s (U^T g))

    so ``z`` is all that has to be kept, and no gradient of kernel size is formed. Where a 1x1 kernel does
    not narrow, ``x`` is kept in its place: of the same size, kept anyway by most that comes before, such as
    a ReLU, and ``z`` is the smaller part of the work to do again.
    """

    @staticmethod
    def forward(
        x: Tensor, s: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, geometry: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        z = convolve(x, v.to(dtype), None, geometry)  # (B, R, ...)
        groups, ones = geometry[3], (1,) * (x.dim() - 2)
        us = (u.unflatten(0, (groups, -1)) * s.view(groups, 1, -1)).flatten(0, 1).to(dtype)  # (O, R / groups)
        bias = None if bias is None else bias.to(dtype)
        if us.numel() == groups:  # depthwise: a scale per channel
            y = z * us.view(-1, *ones)
            return (y if bias is None else y.add_(bias.view(-1, *ones))), z
        return convolve(z, us.view(*us.shape, *ones), bias, (1, 0, dilation_of_ones(z), groups)), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, s, u, v, bias, ctx.geometry, ctx.dtype = inputs
        z = output[1]
        ctx.mark_non_differentiable(z)
        ctx.keeps_input = x.shape == z.shape and v[0].numel() == x.shape[1] and x.dtype == z.dtype
        ctx.save_for_backward(x if ctx.keeps_input else z, s, u, v)
        ctx.size, ctx.stride = x.shape, x.stride()
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, s, u, v = ctx.saved_tensors
        if ctx.keeps_input and ctx.needs_input_grad[1]:
            z = convolve(z, v.to(ctx.dtype), None, ctx.geometry)
        groups, ones = ctx.geometry[3], (1,) * (z.dim() - 2)
        positions = (0, *range(2, z.dim()))
        bias_gradient = g.sum(positions).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        # Factors are scaled rather than feature maps, which are larger and would be passed over once more.
        if u.numel() == groups:
            h, s_scale, v_scale = g, u.flatten(), s * u.flatten()  # h is U^T g without U's sign
        else:
            kernel = u.to(ctx.dtype).view(*u.shape, *ones)
            geometry = (1, 0, dilation_of_ones(z), groups)
            h, s_scale, v_scale = _convolve_back(g, z, kernel, geometry), None, s  # (B, R, ...)
        s_gradient = None
        if ctx.needs_input_grad[1]:
            # Sums over thousands of positions: in bfloat16 they would stop growing.
            wide = torch.promote_types(s.dtype, torch.float32)
            s_gradient = (z * h).sum(positions, dtype=wide).to(s.dtype)
            s_gradient = s_gradient if s_scale is None else s_gradient * s_scale
        if not ctx.needs_input_grad[0]:  # the first trained layer
            return None, s_gradient, None, None, bias_gradient, None, None
        x_like = g.new_empty_strided(ctx.size, ctx.stride)  # only its shape and memory format are read
        scaled = (v * v_scale.view(-1, 1, *ones)).to(ctx.dtype)
        return (
            _convolve_back(h, x_like, scaled, ctx.geometry),
            s_gradient,
            None,
            None,
            bias_gradient,
            None,
            None,
        )


class CorrectedConvolution(torch.autograd.Function):
    """``y = (rest + U_k diag(s) V_k^T) * x + bias`` with gradients for ``x``, ``s`` and ``bias`` only.

    One dense convolution each way, as in a frozen layer. On top come ``z = V_k * x`` and ``U_k^T g``, of k
    channels each, whose product is the gradient of ``s``; only ``z`` is kept. The kernel is put together
    twice, which costs little at a low rank, rather than kept for every layer at once.
    """

    @staticmethod
    def forward(
        x: Tensor,
        s: Tensor,
        u: Tensor,
        v: Tensor,
        rest: Tensor,
        bias: Tensor | None,
        geometry: Any,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        kernel = _corrected(rest, u, s, v, geometry[3]).to(dtype)
        y = convolve(x, kernel, None if bias is None else bias.to(dtype), geometry)
        return y, convolve(x, v.to(dtype), None, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, s, u, v, rest, bias, ctx.geometry, ctx.dtype = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], s, u, v, rest)
        ctx.size, ctx.stride = x.shape, x.stride()
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        z, s, u, v, rest = ctx.saved_tensors
        groups, ones = ctx.geometry[3], (1,) * (z.dim() - 2)
        positions = (0, *range(2, z.dim()))
        x_gradient = s_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_like = g.new_empty_strided(ctx.size, ctx.stride)  # only its shape and memory format are read
            kernel = _corrected(rest, u, s, v, groups).to(ctx.dtype)
            x_gradient = _convolve_back(g, x_like, kernel, ctx.geometry)
        if ctx.needs_input_grad[1]:
            geometry = (1, 0, dilation_of_ones(z), groups)
            h = _convolve_back(g, z, u.to(ctx.dtype).view(*u.shape, *ones), geometry)  # U_k^T g
            wide = torch.promote_types(s.dtype, torch.float32)
            s_gradient = (z * h).sum(positions, dtype=wide).to(s.dtype)
        if ctx.needs_input_grad[5]:
            bias_gradient = g.sum(positions).to(ctx.bias_dtype)
        return x_gradient, s_gradient, None, None, None, bias_gradient, None, None


def _corrected(rest: Tensor, u: Tensor, s: Tensor, v: Tensor, groups: int) -> Tensor:
    return rest + rebuild(u, s, v.flatten(1), groups).view(rest.shape)


def dilation_of_ones(x: Tensor) -> int:
    """A dilation for 1x1 kernels, to which it means nothing.

    On one thread torch gives 1x1 kernels to the matrix product of MKL, unless they are dilated; oneDNN takes
    those, and takes up to a quarter less time.
    """
    return 2 if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 else 1


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    return CONVOLVE[kernel.dim() - 2](x, kernel, bias, *geometry)


def _convolve_back(g: Tensor, x_like: Tensor, kernel: Tensor, geometry: Any) -> Tensor:
    """Gradient at the input of a convolution whose output has gradient ``g``."""
    spatial = kernel.dim() - 2
    stride, padding, dilation = ([n] * spatial if isinstance(n, int) else list(n) for n in geometry[:3])
    return torch.ops.aten.convolution_backward(
        g,
        x_like,
        kernel,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * spatial,
        geometry[3],
        [True, False, False],
    )[0]

"""Singular value fine-tuning: factor the pretrained layers, train their singular values, freeze the rest.

A kernel, read as a matrix with one row per output channel, is ``W = U diag(s) V^T``. Only ``s`` trains.

Source:
    Sun et al., Singular Value Fine-tuning: Few-shot Segmentation requires Few-parameters Fine-tuning,
    NeurIPS 2022, arXiv:2206.06122. The authors' code (github.com/syp2ysy/SVF) was studied for its
    behaviour, none of it is used. Where we knowingly differ:

    - Full rank means full rank; theirs rounds the rank down to a multiple of four (27 becomes 24 in the
      stem, which changes what the stem computes).
    - One decomposition per group of a grouped or depthwise convolution; theirs mixes rows of different
      groups, or skips the layer. Linear layers get their factors; theirs keep random ones.
    - ``padding_mode``, dtype and device are kept, and every reconstruction is checked.
    - Theirs always computes two convolutions and a scale. Here training does so too, with a backward pass
      that keeps one feature map per layer, and evaluation is one plain convolution.

With ``rank=k`` only the k largest values train, which are those that move in the paper's Fig. 6. The kernel
is then ``rest + U_k diag(s) V_k^T``, still exact, and training costs little more than a frozen one.

This file needs torch only and works on any network::

    network.requires_grad_(False)
    apply_svf(network, ["layer3", "layer4"])             # the new parameters, called s, are all that trains
    torch.save(svf_state_dict(network), "small.pt")      # kilobytes
    load_svf_state_dict(network, torch.load("small.pt"))
    merge_svf(network)                                   # the plain layers again
"""

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available()
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# timm's convolutions that pad by the size of the input, as TensorFlow does. By name, because timm is not
# needed here; their forward is otherwise the plain one.
_PAD_BY_INPUT_SIZE = ("Conv2dSame", "Conv2dSameExport")
_CONVOLUTION_ARGUMENTS = (
    "in_channels out_channels kernel_size stride dilation padding padding_mode output_padding"
)
# Relative error (Frobenius norm) up to which U diag(s) V^T counts as the weight it came from.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class SVFLayer(nn.Module):
    """A convolution or linear layer held as its singular value decomposition; only ``s`` is meant to train.

    With gradients wanted for ``s`` it runs as two convolutions, whatever ``training`` says; otherwise as
    the one plain convolution it stands for, whose kernel is rebuilt when a factor has changed. A grouped
    layer has one decomposition per group: ``u`` is then the block-diagonal matrix without its zeros, in
    the layout of a grouped 1x1 kernel, and ``s`` is sorted within each group. A transposed convolution
    has the factors of the convolution that it transposes: in all shapes here ``O`` and ``I`` change places.

    Attributes:
        s: Singular values, shape ``(R,)``, descending and not negative until they train; no sign or order
            is enforced afterwards. Full rank is ``groups * min(O / groups, I / groups * kernel positions)``.
        u: Left singular vectors, shape ``(O, R / groups)``.
        vh: Right singular vectors, shape ``(R, I / groups * kernel positions)``.
        a: None, or logarithms of a factor on ``s``, shape ``(R,)``; :func:`prepare` puts them there.
        rest: What the factors leave of the kernel, in its shape, and frozen; None at full rank.
        bias: The layer's own bias or None; shared with the original layer, not copied.

    Args:
        plain: ``Conv1d``, ``Conv2d``, ``Conv3d``, their transposed kinds, ``Linear``, or a subclass that
            computes the same thing. It is left as it was.
        factors: ``(u, s, vh)`` to use instead of decomposing ``plain.weight``; see :func:`from_factors`.
        rank: How many values train, per group; the largest ones. None: all.

    Raises:
        ValueError: If the layer is of a kind that has no such factors (a weight that is itself computed),
            if its weight holds NaN or infinity, if the factors do not give the weight back, or if ``rank``
            is above the layer's. Where a group has fewer values, as in a depthwise convolution, all train.
    """

    s: Tensor
    u: Tensor
    vh: Tensor
    a: Tensor | None
    rest: Tensor | None
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any  # numbers, or the string "same" or "valid"
    padding_mode: str
    _shell: Any

    def __init__(
        self,
        plain: nn.Module,
        factors: tuple[Tensor, Tensor, Tensor] | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        weight = _weight_of(plain)
        convolution = isinstance(plain, _CONVOLUTIONS)
        self.groups: int = plain.groups if convolution else 1  # type: ignore[assignment]
        self.kernel_shape = tuple(weight.shape)  # (O, I / groups, *kernel)
        self.transposed = isinstance(plain, _TRANSPOSED)
        u, s, vh = decompose(weight, self.groups) if factors is None else factors
        rest = None
        if rank is not None:
            u, s, vh, rest = _leading(u, s, vh, self.groups, rank, weight)
        self.s = nn.Parameter(s)  # (R,)
        # Saved in checkpoints: the decomposition is unique only up to signs, so recomputing it on another
        # machine could pair s with other factors.
        self.register_buffer("u", u)  # (O, R / groups)
        self.register_buffer("vh", vh)  # (R, I / groups * kernel)
        self.register_buffer("rest", rest)
        self.register_parameter("a", None)
        self.register_parameter("bias", plain.bias)  # type: ignore[arg-type]

        # What neighbours may ask of the layer, under the names that torch gives it.
        for name in (_CONVOLUTION_ARGUMENTS if convolution else "in_features out_features").split():
            setattr(self, name, getattr(plain, name))
        self._pad_by_input_size = any(cls.__name__ in _PAD_BY_INPUT_SIZE for cls in type(plain).__mro__)

        # The original without its tensors, for merging: class, arguments and hooks survive. It shares the
        # hook dictionaries with this module, so hooks fire here and handles taken earlier still work.
        shell = copy.copy(plain)
        shell._parameters = dict.fromkeys(plain._parameters)
        object.__setattr__(self, "_shell", shell)  # not a child: it has nothing to train, move or save
        for name in _HOOKS:
            self.__dict__[name] = plain.__dict__[name]
        self.training = plain.training
        self._described = repr(plain)
        self._kernel: tuple[Any, Tensor] | None = None

    @property
    def values(self) -> Tensor:
        """What stands between ``u`` and ``vh`` now, shape ``(R,)``: ``s``, or ``s * exp(a)``."""
        return self.s if self.a is None else self.s * self.a.exp()

    @property
    def weight(self) -> Tensor:
        """The kernel as it stands now, in the shape of the original's; gradients reach ``s`` through it."""
        weight = _rebuild(self.u, self.values, self.vh, self.groups).view(self.kernel_shape)
        return weight if self.rest is None else weight + self.rest

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer to ``(B, I, ...)``, or ``(..., I)`` if it is linear.

        Args:
            x: The input.
            output_size: Height and width wanted of a transposed convolution, as in torch.
        """
        values = self.values
        factored = torch.is_grad_enabled() and (
            values.requires_grad or self.u.requires_grad or self.vh.requires_grad
        )
        if len(self.kernel_shape) == 2:
            if not factored:
                return F.linear(x, self._plain_kernel(x), self.bias)
            # Autograd alone does it well here: where u and vh are constants it forms no kernel gradient.
            y = F.linear(F.linear(x, self.vh) * values, self.u, self.bias)
            return y if self.rest is None else y + F.linear(x, self.rest)
        if self.transposed:
            return self._transposed_convolution(x, output_size, values if factored else None)
        if not factored:
            x, padding = self._pad(x)
            return _convolve(
                x, self._plain_kernel(x), self.bias, (self.stride, padding, self.dilation, self.groups)
            )
        return self._factored_convolution(x, values)

    def _transposed_convolution(
        self, x: Tensor, output_size: Sequence[int] | None, values: Tensor | None
    ) -> Tensor:
        """The transposed order ``V (s (U^T x))``: the small kernel comes first, before the map grows."""
        spatial = len(self.kernel_shape) - 2
        output_padding = self._shell._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        geometry = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        if values is None:
            return _TRANSPOSE[spatial](x, self._plain_kernel(x), self.bias, *geometry)
        ones = (1,) * spatial
        u = self.u.unflatten(0, (self.groups, -1)).mT.flatten(0, 1)  # (R, I / groups)
        z = _CONVOLVE[spatial](x, u.reshape(*u.shape, *ones), groups=self.groups) * values.view(-1, *ones)
        y = _TRANSPOSE[spatial](z, self.vh.view(-1, *self.kernel_shape[1:]), self.bias, *geometry)
        return y if self.rest is None else y + _TRANSPOSE[spatial](x, self.rest, None, *geometry)

    def _factored_convolution(self, x: Tensor, values: Tensor) -> Tensor:
        unbatched = x.dim() < len(self.kernel_shape)
        x, padding = self._pad(x[None] if unbatched else x)
        geometry: Any = (self.stride, padding, self.dilation, self.groups)
        v = self.vh.view(-1, *self.kernel_shape[1:])
        if self.u.requires_grad or self.vh.requires_grad:
            ones = (1,) * (x.dim() - 2)
            z = _convolve(x, v, None, geometry) * values.view(-1, *ones)
            y = _convolve(z, self.u.view(*self.u.shape, *ones), self.bias, (1, 0, 1, self.groups))
            if self.rest is not None:
                y = y + _convolve(x, self.rest, None, geometry)
        else:
            # A custom function is opaque to autocast, so its input is cast here, as autocast would.
            dtype, device = self.vh.dtype, x.device.type
            if torch.is_autocast_enabled(device) and x.dtype != torch.float64 and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device)
                x = x.to(dtype)
            if max(self.kernel_size) == 1:
                geometry = (self.stride, padding, _dilation_of_ones(x), self.groups)
            if self.rest is None:
                y, _ = _FactoredConvolution.apply(x, values, self.u, v, self.bias, geometry, dtype)
            else:
                y, _ = _CorrectedConvolution.apply(
                    x, values, self.u, v, self.rest, self.bias, geometry, dtype
                )
        return y[0] if unbatched else y

    def _pad(self, x: Tensor) -> tuple[Tensor, Any]:
        """Pad ``x`` by hand where a convolution cannot; and the padding left to the convolution."""
        spatial = len(self.kernel_shape) - 2
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if self._pad_by_input_size:
            total = [
                max((math.ceil(n / s) - 1) * s + r + 1 - n, 0)
                for n, s, r in zip(x.shape[-spatial:], self.stride, reach, strict=True)
            ]
        elif self.padding == "same":
            total = reach
        else:
            total = [0] * spatial if self.padding == "valid" else [2 * p for p in self.padding]
        if self.padding_mode == "zeros" and all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]  # F.pad: last axis first
        return F.pad(x, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode), 0

    def _plain_kernel(self, x: Tensor) -> Tensor:
        """The kernel for evaluation, without gradient, rebuilt only if a factor has changed since.

        It lies in memory as ``x`` does, or torch would turn one of them around in every call.
        """
        if torch.compiler.is_compiling():  # a compiled graph cannot ask for versions; it fuses the product
            return self.weight.detach()
        factors = [t for t in (self.u, self.s, self.vh, self.a, self.rest) if t is not None]
        tracked = not any(t.is_inference() for t in factors)  # inference tensors count no versions
        last = x.dim() == len(self.kernel_shape) == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format
        state = None
        if tracked:
            state = [layout, *((t.data_ptr(), t._version, t.dtype, t.device) for t in factors)]
        if self._kernel is None or state is None or self._kernel[0] != state:
            self._kernel = (state, _merged_weight(self).contiguous(memory_format=layout))
        return self._kernel[1]

    def train(self, mode: bool = True) -> "SVFLayer":
        """Switch mode and forget the rebuilt kernel: writes through ``s.data`` leave no trace in versions."""
        self._kernel = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # copies and pickles carry the factors only

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take on the rank of the incoming factors: imported checkpoints may hold less than full rank."""
        incoming = state_dict.get(prefix + "s")
        if incoming is not None and incoming.dim() == 1 and len(incoming) % self.groups == 0:
            rank = len(incoming)
            if rank != len(self.s):
                self.s.data = self.s.new_zeros(rank)
                self.u.data = self.u.new_zeros(self.u.shape[0], rank // self.groups)
                self.vh.data = self.vh.new_zeros(rank, self.vh.shape[1])
                if self.a is not None:
                    self.a.data = self.a.new_zeros(rank)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The layer it stands for and the number of its values."""
        return f"{self._described}, rank={len(self.s)}{'' if self.rest is None else ' and a frozen rest'}"


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _FactoredConvolution(torch.autograd.Function):
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
        z = _convolve(x, v.to(dtype), None, geometry)  # (B, R, ...)
        groups, ones = geometry[3], (1,) * (x.dim() - 2)
        us = (u.unflatten(0, (groups, -1)) * s.view(groups, 1, -1)).flatten(0, 1).to(dtype)  # (O, R / groups)
        bias = None if bias is None else bias.to(dtype)
        if us.numel() == groups:  # depthwise: a scale per channel
            y = z * us.view(-1, *ones)
            return (y if bias is None else y.add_(bias.view(-1, *ones))), z
        return _convolve(z, us.view(*us.shape, *ones), bias, (1, 0, _dilation_of_ones(z), groups)), z

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
            z = _convolve(z, v.to(ctx.dtype), None, ctx.geometry)
        groups, ones = ctx.geometry[3], (1,) * (z.dim() - 2)
        positions = (0, *range(2, z.dim()))
        bias_gradient = g.sum(positions).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        # Factors are scaled rather than feature maps, which are larger and would be passed over once more.
        if u.numel() == groups:
            h, s_scale, v_scale = g, u.flatten(), s * u.flatten()  # h is U^T g without U's sign
        else:
            kernel = u.to(ctx.dtype).view(*u.shape, *ones)
            geometry = (1, 0, _dilation_of_ones(z), groups)
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


class _CorrectedConvolution(torch.autograd.Function):
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
        y = _convolve(x, kernel, None if bias is None else bias.to(dtype), geometry)
        return y, _convolve(x, v.to(dtype), None, geometry)

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
            geometry = (1, 0, _dilation_of_ones(z), groups)
            h = _convolve_back(g, z, u.to(ctx.dtype).view(*u.shape, *ones), geometry)  # U_k^T g
            wide = torch.promote_types(s.dtype, torch.float32)
            s_gradient = (z * h).sum(positions, dtype=wide).to(s.dtype)
        if ctx.needs_input_grad[5]:
            bias_gradient = g.sum(positions).to(ctx.bias_dtype)
        return x_gradient, s_gradient, None, None, None, bias_gradient, None, None


def _corrected(rest: Tensor, u: Tensor, s: Tensor, v: Tensor, groups: int) -> Tensor:
    return rest + _rebuild(u, s, v.flatten(1), groups).view(rest.shape)


def _dilation_of_ones(x: Tensor) -> int:
    """A dilation for 1x1 kernels, to which it means nothing.

    On one thread torch gives 1x1 kernels to the matrix product of MKL, unless they are dilated; oneDNN takes
    those, and takes up to a quarter less time.
    """
    return 2 if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 else 1


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    return _CONVOLVE[kernel.dim() - 2](x, kernel, bias, *geometry)


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
        again = _rebuild(u.double(), s.double(), vh.double(), groups)
        error = float((again - matrix.flatten(0, 1)).norm() / matrix.norm().clamp_min(1e-300))
        if not error <= _TOLERANCE[weight.dtype]:
            raise ValueError(
                f"U diag(s) V^T differs from the weight by {error:.1e} of its norm, more than "
                f"{_TOLERANCE[weight.dtype]:.0e} for {weight.dtype}; leave this layer out"
            )
        # Row by row in memory, or every convolution would first copy its kernel.
        return u.contiguous().to(weight.device), s.to(weight.device), vh.contiguous().to(weight.device)


def _leading(
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
        leading = _rebuild(wide[0], wide[1], wide[2], groups).view(weight.shape)
        return u, s, vh, (weight.to(device, torch.float64) - leading).to(weight.device, weight.dtype)


def from_factors(plain: nn.Module, u: Tensor, s: Tensor, vh: Tensor) -> SVFLayer:
    """The factored layer with given factors, whatever their rank, in the place of ``plain``.

    Args:
        plain: The layer that says stride, padding, bias, dtype and device; its weight is not read.
        u: Left factors, ``(O, R / groups)``, or with trailing ones as in a 1x1 kernel.
        s: Scales, R of them in any shape.
        vh: Right factors, ``(R, I / groups * kernel positions)`` or shaped like a kernel.

    Raises:
        ValueError: If the shapes do not fit the layer or each other.
    """
    weight = _weight_of(plain)
    groups = plain.groups if isinstance(plain, _CONVOLUTIONS) else 1
    rank = s.numel()
    if (
        rank % groups
        or (u.shape[0], u[0].numel()) != (weight.shape[0], rank // groups)
        or (vh.shape[0], vh[0].numel()) != (rank, weight[0].numel())
    ):
        raise ValueError(
            f"factors u {tuple(u.shape)}, s {tuple(s.shape)}, vh {tuple(vh.shape)} do not make a weight of "
            f"shape {tuple(weight.shape)} with groups={groups}; take the factors that belong to this layer"
        )
    fit = [
        t.detach().to(weight.device, weight.dtype).clone() for t in (u.flatten(1), s.flatten(), vh.flatten(1))
    ]
    return SVFLayer(plain, (fit[0], fit[1], fit[2]))


def apply_svf(module: nn.Module, layers: Sequence[str] | None = None, rank: int | None = None) -> nn.Module:
    """Replace convolutions and linear layers by factored ones, in place.

    What the network computes does not change. Layers that are factored already are left alone, so a
    second call changes nothing. A layer that appears under several names is replaced under all of them
    by one new layer; two layers that share only their weight come apart. The new ``s`` train; all else
    is left as it was, so freeze the network first if ``s`` alone should train.

    Args:
        module: A network, or a single layer.
        layers: Names of submodules to look in, such as ``("layer3", "layer4.0.conv1")``; None means all.
        rank: How many values of a layer are held as factors, the largest ones; None means all. In a grouped
            layer it counts per group, and a group with fewer gives all it has.

    Returns:
        ``module``, or its replacement where ``module`` itself is a layer.

    Raises:
        ValueError: If a name does not exist or holds nothing to factor, or a layer cannot be factored, has
            a lower rank than asked for, or is factored already at another rank.

    Example:
        >>> apply_svf(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        Sequential(
          (0): SVFLayer(Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), rank=8)
          (1): ReLU()
        )
    """
    chosen: dict[nn.Module, str] = {}
    for prefix in [""] if layers is None else [layers] if isinstance(layers, str) else layers:
        found = {child: name for name, child in _under(module, prefix) if _has_kernel(child)}
        if not found and layers is not None:
            raise ValueError(f"layers: {prefix!r} holds no convolution or linear layer; name one that does")
        chosen |= found
    new: dict[nn.Module, nn.Module] = {}
    for plain, name in chosen.items():
        try:
            if not isinstance(plain, SVFLayer):
                new[plain] = SVFLayer(plain, rank=rank)
            elif rank is not None and len(plain.s) > rank * plain.groups:
                raise ValueError(
                    f"is factored already, with {len(plain.s)} values and not {rank}; merge_svf first"
                )
        except ValueError as error:
            raise ValueError(f"{name or type(plain).__name__}: {error}") from None
    return _replace(module, new)


def merge_svf(module: nn.Module) -> nn.Module:
    """Fold every factored layer back into the plain layer it came from, in place.

    Class, arguments, bias and hooks are the original's; the weight is ``U diag(s) V^T`` with ``s`` as it
    stands, multiplied in float64.

    Returns:
        ``module``, or its replacement where ``module`` itself is a factored layer.
    """
    return _replace(
        module, {layer: _plain_layer(layer) for layer in module.modules() if isinstance(layer, SVFLayer)}
    )


def singular_values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained values of every factored layer, by the layer's name; shape ``(R,)`` each."""
    return {
        name: layer.values.detach().clone()
        for name, layer in module.named_modules()
        if isinstance(layer, SVFLayer)
    }


def svf_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What SVF trains, under the names that ``module.state_dict()`` gives it; not copied.

    That is the ``s`` of every factored layer, its ``a`` where there is one, and ``u`` and ``vh`` only
    where they train.
    """
    return {
        f"{name}.{part}".lstrip("."): getattr(layer, part).detach()
        for name, layer in module.named_modules()
        if isinstance(layer, SVFLayer)
        for part in ("s", "a", "u", "vh")
        if layer._parameters.get(part) is not None
    }


def load_svf_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`svf_state_dict` gave: all of it, or nothing and an error.

    Singular values mean something only beside the factors they were trained with: same base weights, same
    layers. This function sees names and shapes alone; the files of ``singular_files.py`` check the rest.

    Raises:
        ValueError: At the first name that is missing, left over or of another shape, or if a value is NaN
            or infinite.
    """
    own = svf_state_dict(module)
    for name in [*state, *own]:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=3) or list(own)[:3]
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "call apply_svf first"
            raise ValueError(f"{name!r} is no value of a factored layer here; {hint}")
        if name not in state:
            raise ValueError(f"there is no {name!r} in the state; factor the layers that it was saved from")
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state[name].shape)}, here it has {tuple(own[name].shape)}; "
                "the state belongs to another network or another rank"
            )
        if not state[name].isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinity; the training that made it has diverged")
    for name, value in own.items():
        value.copy_(state[name])


def prepare(
    backbone: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    train: Sequence[str] = ("s",),
    kernels: Sequence[str] | None = None,
    parametrization: str = "s",
    rank: int | None = None,
) -> None:
    """Train the singular values, or other factors, of some stages and nothing else in the backbone.

    Only these layers are decomposed: a frozen layer gains nothing from factors and would lose speed.

    Args:
        backbone: Changed in place; calling again changes nothing.
        stages: Names of its submodules. The default is the authors'; Table 9 of the paper compares others.
        train: Which factors train, from "u", "s", "v" (Table 8). Nothing keeps "u" and "v" orthogonal.
        kernels: Kernel sizes to factor, such as "3x3"; linear layers count as "1x1". None means all.
        parametrization: Of the values: "s"; "exp" trains ``a`` in ``s * exp(a)``, so that a large value
            moves further and none changes its sign; "both" trains ``s`` and ``a`` (Table 12). Weight decay
            pulls ``s`` to zero, but ``a`` back to the pretrained network.
        rank: Factor only the largest values of each layer, that many; see :func:`apply_svf`.

    Raises:
        ValueError: If a stage does not exist or holds nothing to factor, a layer in it cannot be factored
            or has a lower rank, no layer has one of the kernel sizes, or ``train`` or ``parametrization``
            is none of the above.
    """
    if not train or set(train) - {"u", "s", "v"} or isinstance(train, str):
        raise ValueError(f"train must be a list of factors from u, s, v; got {train!r}")
    if parametrization not in ("s", "exp", "both") or (parametrization != "s" and "s" not in train):
        raise ValueError(
            f"parametrization must be 's', 'exp' or 'both', the latter two with 's' in train; "
            f"got {parametrization!r} with train={list(train)}"
        )
    names = list(stages) if kernels is None else _of_kernel_size(backbone, stages, kernels)
    apply_svf(backbone, names, rank)
    backbone.requires_grad_(False)
    for layer in {layer for name in names for _, layer in _under(backbone, name)}:
        if isinstance(layer, SVFLayer):
            _train_factors(layer, train, parametrization)


def _of_kernel_size(module: nn.Module, stages: Sequence[str], kernels: Sequence[str]) -> list[str]:
    """Names of the layers of some stages whose kernel has one of the given sizes."""
    sizes = {}
    for stage in stages:
        for name, layer in _under(module, stage):
            if _has_kernel(layer):
                sizes[name] = "x".join(map(str, getattr(layer, "kernel_size", (1, 1))))
    for kernel in kernels:
        if kernel not in sizes.values():
            raise ValueError(
                f"kernels: no layer of {', '.join(stages)} has a kernel of {kernel}; "
                f"there are {', '.join(sorted(set(sizes.values()))) or 'none'}"
            )
    return [name for name, size in sizes.items() if size in kernels]


def _train_factors(layer: SVFLayer, train: Sequence[str], parametrization: str) -> None:
    """Let some factors of a layer train. A factor that trains is a parameter, one that does not a buffer."""
    for name, factor in (("u", "u"), ("vh", "v")):
        tensor = getattr(layer, name)
        if (factor in train) != isinstance(tensor, nn.Parameter):
            delattr(layer, name)
            if factor in train:
                layer.register_parameter(name, nn.Parameter(tensor))
            else:
                layer.register_buffer(name, tensor.detach())
    if parametrization != "s" and layer.a is None:
        layer.a = nn.Parameter(torch.zeros_like(layer.s))
    for name, factor in (("u", "u"), ("vh", "v")):
        getattr(layer, name).requires_grad_(factor in train)
    layer.s.requires_grad_("s" in train and parametrization != "exp")
    if layer.a is not None:
        layer.a.requires_grad_(parametrization != "s")


def _has_kernel(module: nn.Module) -> bool:
    """Whether this is a layer to factor, one that is, or one that must be refused rather than overlooked."""
    return isinstance(module, (SVFLayer, nn.Linear, nn.modules.conv._ConvNd))


def _weight_of(plain: nn.Module) -> Tensor:
    """The weight of a layer that can be factored; a ValueError says why another one cannot."""
    kind = type(plain).__name__
    plain_forward = (*(cls.forward for cls in _CONVOLUTIONS), nn.Linear.forward)
    if not isinstance(plain, (*_CONVOLUTIONS, nn.Linear)):
        raise ValueError(f"SVF factors convolutions and linear layers, got {kind}; leave this layer out")
    if not any(cls.__name__ in _PAD_BY_INPUT_SIZE for cls in type(plain).__mro__) and (
        type(plain).forward not in plain_forward
        or getattr(type(plain), "_conv_forward", None)
        not in (None, *(c._conv_forward for c in _CONVOLUTIONS))
    ):
        raise ValueError(
            f"{kind} computes its output in its own way, which factors cannot follow; leave it out"
        )
    weight = plain._parameters.get("weight")
    if weight is None:
        raise ValueError(f"the weight of this {kind} is itself computed; remove its parametrization first")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"this {kind} has no weight yet; run the network once, then decompose")
    if weight.dtype not in _TOLERANCE:
        raise ValueError(
            f"SVF factors real floating point weights, got {weight.dtype}; convert the layer first"
        )
    return weight


def _under(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module at or below a dotted name, under its full name."""
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    if prefix not in names:
        near = difflib.get_close_matches(prefix, names, n=3)
        near += [name for name in names if name.endswith("." + prefix)][:3]
        near = near or [name for name, _ in module.named_children()]
        raise ValueError(
            f"layers: no module is called {prefix!r}; did you mean {', '.join(map(repr, near))}?"
        )
    for name, child in module.named_modules(remove_duplicate=False):
        if prefix in ("", name) or name.startswith(prefix + "."):
            yield name, child


def _replace(module: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules where the old ones are, under every name that they have."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
    return new.get(module, module)


def _rebuild(u: Tensor, s: Tensor, vh: Tensor, groups: int) -> Tensor:
    """``U diag(s) V^T`` for every group, as a matrix ``(O, I / groups * kernel positions)``."""
    scaled = u.unflatten(0, (groups, -1)) * s.view(groups, 1, -1)  # (groups, O / groups, R / groups)
    return (scaled @ vh.unflatten(0, (groups, -1))).flatten(0, 1)


def _merged_weight(layer: SVFLayer) -> Tensor:
    """The kernel multiplied in float64, without gradient, in the layer's dtype and on its device."""
    # Not an inference tensor even if asked for under inference_mode: a later backward may need it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(layer.s.device.type, enabled=False):
        device = "cpu" if layer.s.device.type == "mps" else layer.s.device  # no float64 on Apple's GPU
        u, s, vh = (t.to(device, torch.float64) for t in (layer.u, layer.s, layer.vh))
        if layer.a is not None:
            s = s * layer.a.to(device, torch.float64).exp()
        weight = _rebuild(u, s, vh, layer.groups).view(layer.kernel_shape)
        if layer.rest is not None:
            weight += layer.rest.to(device)
        return weight.to(layer.s.device, layer.s.dtype)


def _plain_layer(layer: SVFLayer) -> nn.Module:
    plain = copy.copy(layer._shell)
    weight = nn.Parameter(_merged_weight(layer), requires_grad=layer.s.requires_grad)
    plain._parameters = {"weight": weight, "bias": layer.bias}
    plain.training = layer.training
    return plain

"""What SVF costs in training: ratios to frozen convolutions that pass a gradient on to their input.

    OMP_NUM_THREADS=1 python benchmarks/svf.py           # ResNet-50, layers 2-4; minutes
    python benchmarks/svf.py --device cuda --size 473 --batch 8 --dtype bfloat16

Layers 2-4 alone are timed, on features of layer 1 that want a gradient, with weights drawn at random. Every
round runs each implementation once; the smallest time of each is reported, so that what else the machine
does falls on all alike. On the CPU it is the process's own time, on a GPU wall time.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from svf_lightning.backbones import resnet
from svf_lightning.finetune.svf import SVFLayer, apply_svf


class Rebuilt(nn.Module):
    """The kernel as a parametrization: rebuilt each forward, with a gradient of its size each backward."""

    def __init__(self, layer: SVFLayer) -> None:
        super().__init__()
        self.s = layer.s
        self.u, self.vh, self.shape = layer.u, layer.vh, layer.kernel_shape

    def forward(self, _: Tensor) -> Tensor:
        return ((self.u * self.s) @ self.vh).view(self.shape)


class Published(nn.Module):
    """Two convolutions with a scale between them, left to autograd."""

    def __init__(self, layer: SVFLayer) -> None:
        super().__init__()
        self.s, self.bias = layer.s, layer.bias
        self.v, self.u = layer.vh.view(-1, *layer.kernel_shape[1:]), layer.u[..., None, None]
        self.geometry = (layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.v, None, *self.geometry) * self.s[:, None, None], self.u, self.bias)


def rebuilt(layer: SVFLayer, plain: nn.Module) -> nn.Module:
    plain = copy.deepcopy(plain)
    parametrize.register_parametrization(plain, "weight", Rebuilt(layer), unsafe=True)
    plain.parametrizations.weight.original.requires_grad_(False)
    return plain


def convert(net: nn.Module, build: Callable[[SVFLayer, nn.Module], nn.Module], plain: nn.Module) -> nn.Module:
    """A copy of a factored network with every factored layer replaced."""
    net = copy.deepcopy(net)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, SVFLayer):
            net.set_submodule(name, build(layer, plain.get_submodule(name)))
    return net


def main() -> None:
    """Time every implementation in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=241, help="side of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of autocast")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    backbone = resnet.resnet50(weights=None).eval().requires_grad_(False)
    frozen = nn.Sequential(backbone.layer2, backbone.layer3, backbone.layer4)
    full = copy.deepcopy(frozen)
    for module in full.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_(True)
    ours = apply_svf(copy.deepcopy(frozen))
    nets = {
        "forward only": frozen,
        "floor: frozen, gradient to the input": frozen,
        "full fine-tuning of the convolutions": full,
        "kernel rebuilt each step": convert(ours, rebuilt, frozen),
        "two convolutions and a scale (as published)": convert(
            ours, lambda layer, _: Published(layer), frozen
        ),
        "ours": ours,
    }
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    with torch.no_grad():
        x = backbone.layer1(backbone.layer0(torch.randn(args.batch, 3, args.size, args.size)))
    x = x.to(args.device, memory_format=layout).requires_grad_(True)
    nets = {name: net.to(args.device, memory_format=layout) for name, net in nets.items()}
    cuda = args.device.startswith("cuda")

    def seconds(name: str, net: nn.Module) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if name == "forward only":
                with torch.no_grad():
                    net(x)
            else:
                net(x).sum().backward()
        if cuda:
            torch.cuda.synchronize()
        taken = (time.perf_counter() if cuda else time.process_time()) - start
        x.grad = None
        net.zero_grad()
        return taken

    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, net in nets.items():
            times[name].append(seconds(name, net))
    best = {name: min(t[1:]) for name, t in times.items()}
    floor = best["floor: frozen, gradient to the input"]
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}, "
          f"{args.batch} x {args.size} x {args.size}, best of {args.rounds}")  # fmt: skip
    print("| implementation | seconds | time / floor |\n|---|---|---|")
    for name, taken in best.items():
        print(f"| {name} | {taken:.3f} | {taken / floor:.2f} |")


if __name__ == "__main__":
    main()

"""`svf benchmark strategies`: time and memory of every fine-tune strategy, in training and evaluation.

    svf benchmark strategies
    svf benchmark strategies --strategy svf --strategy svf_rank30 --dtype bfloat16 --channels-last

The network is a ResNet-50 at output stride 8 with random weights, of which layers 2 to 4 run, on features of
layer 1 that want a gradient. The floor is that network frozen: forward, and the gradient at the input alone.
Nothing that trains layers 2 to 4 end to end can do less. (A frozen backbone under training heads does: it
needs no backward at all and costs what its evaluation does.) A strategy that trains layer 1 too runs from
there, beside a floor that does so as well.

Strategies are those of ``conf/finetune``. Two other forms of SVF stand beside them: the published one, two
convolutions and a scale left to autograd, and the kernel rebuilt at every step, as a weight parametrization
does it.

Time: a strategy and its floor take turns, after one round to warm up, and of each the fastest round counts,
so a slow minute falls on both. On the CPU it is the process's own time on one thread, on a GPU wall time
between synchronisations. ``svb`` and ``spectral_clip`` are measured without what they do every hundred steps.

Memory: the most that tensors hold in one step beyond what they held before it, as the allocator of torch
counts it, on the GPU as on the CPU. So it is exact and the same on every run. What a process takes from the
system is more by the scratch space of the libraries and by what malloc keeps, which vary with the machine.
"""

import copy
import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from svf_lightning.backbones.resnet import resnet50
from svf_lightning.finetune import frozen, svf
from svf_lightning.progress import track
from svf_lightning.runs.configuration import choices, compose
from svf_lightning.runs.run import build_part
from svf_lightning.svf.layer import SVFLayer
from svf_lightning.svf.network import merge_svf

Prepare = Callable[[Any], None]

STAGES = ("layer0", "layer1", "layer2", "layer3", "layer4")
FLOOR, PUBLISHED, REBUILT = "floor", "svf, as published", "svf, kernel rebuilt"


class Setting(NamedTuple):
    """How the networks run."""

    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # "bfloat16": under autocast
    channels_last: bool = False
    compiled: bool = False
    rounds: int = 5  # of which the fastest counts


AS_IT_COMES = Setting()


class Cost(NamedTuple):
    """What one way of fine-tuning costs; seconds, the smallest of several rounds each."""

    trained: int  # numbers
    forward: float
    backward: float
    training: float  # forward and backward
    step: float  # and the optimizer
    evaluation: float
    memory: float  # megabytes
    first: str  # stage that runs first


class Published(nn.Module):
    """Two convolutions with a scale between them, left to autograd.

    Args:
        layer: A factored convolution without groups.
    """

    def __init__(self, layer: SVFLayer) -> None:
        super().__init__()
        self.s, self.bias = layer.s, layer.bias
        self.register_buffer("v", layer.vh.view(-1, *layer.kernel_shape[1:]))
        self.register_buffer("u", layer.u[..., None, None])
        self.geometry = (layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, I, H, W)``."""
        z = F.conv2d(x, self.v, None, *self.geometry)  # type: ignore[arg-type]
        return F.conv2d(z * self.s[:, None, None], self.u, self.bias)  # type: ignore[arg-type]


class Rebuilt(nn.Module):
    """The kernel as a parametrization: rebuilt each forward, with a gradient of its size each backward."""

    def __init__(self, layer: SVFLayer) -> None:
        super().__init__()
        self.s, self.shape = layer.s, layer.kernel_shape
        self.register_buffer("u", layer.u)
        self.register_buffer("vh", layer.vh)

    def forward(self, _: Tensor) -> Tensor:
        """The kernel ``(O, I, H, W)``, whatever stands in its place."""
        return ((self.u * self.s) @ self.vh).view(self.shape)  # type: ignore[operator]


def prepare_published(backbone: nn.Module) -> None:
    """Train the singular values of layers 2 to 4 in the published form."""
    svf.prepare(backbone)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, SVFLayer):
            backbone.set_submodule(name, Published(layer))


def prepare_rebuilt(backbone: nn.Module) -> None:
    """Train the singular values of layers 2 to 4 through kernels that are rebuilt every time."""
    svf.prepare(backbone)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, SVFLayer):
            plain = merge_svf(layer)
            parametrize.register_parametrization(plain, "weight", Rebuilt(layer), unsafe=True)
            plain.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
            backbone.set_submodule(name, plain)


def measure(
    backbone: nn.Module, ways: Mapping[str, Prepare], images: Tensor, setting: Setting
) -> dict[str, Cost]:
    """Costs of some ways of fine-tuning one backbone, which take turns.

    Args:
        backbone: Stays as it is; each way gets a copy.
        ways: What prepares the copy, by name. All run from the first stage that any of them trains.
        images: Normalised, shape ``(B, 3, H, W)``, on the CPU.
        setting: How they run.
    """
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    tuned: dict[str, Any] = {}
    for name, prepare in ways.items():
        tuned[name] = copy.deepcopy(backbone).eval().requires_grad_(False)
        prepare(tuned[name])
        tuned[name].to(setting.device, memory_format=layout)
    first = min(2, *(_first_trained(network) for network in tuned.values()))
    with torch.no_grad():
        features = nn.Sequential(*(backbone.get_submodule(s) for s in STAGES[:first])).eval()(images)
    x = features.to(setting.device, memory_format=layout).requires_grad_()

    if setting.compiled:
        torch.compiler.reset()  # forget earlier networks, or it soon refuses to compile more
    networks: dict[str, Any] = {}
    for name, network in tuned.items():
        networks[name] = nn.Sequential(*(network.get_submodule(s) for s in STAGES[first:])).eval()
        if setting.compiled:
            networks[name] = torch.compile(networks[name])
    optimizers = {name: _optimizer(network) for name, network in networks.items()}

    steps: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    evaluations: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(setting.rounds + 1):
        for name, network in networks.items():
            steps[name].append(_train(network, optimizers[name], x, setting))
    for _ in range(setting.rounds + 1):
        for name, network in networks.items():
            evaluations[name].append(_evaluate(network, x, setting))
    costs = {}
    for name, network in networks.items():
        forward, backward, training, step = map(min, zip(*steps[name][1:], strict=True))
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        peak = _peak_bytes(partial(_train, network, optimizers[name], x, setting), setting)
        costs[name] = Cost(
            trained,
            forward,
            backward,
            training,
            step,
            min(evaluations[name][1:]),
            peak / 2**20,
            STAGES[first],
        )
    return costs


def _first_trained(backbone: nn.Module) -> int:
    trained = (any(p.requires_grad for p in backbone.get_submodule(s).parameters()) for s in STAGES)
    return next((number for number, trains in enumerate(trained) if trains), len(STAGES))


def _optimizer(network: nn.Module) -> torch.optim.Optimizer | None:
    """The paper's, which does its work at a rate of 0, too, so that no round differs from the one before."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4) if trained else None


def _train(
    network: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, setting: Setting
) -> tuple[float, float, float, float]:
    """Seconds of one forward, of its backward, of both, and of both with the optimizer."""
    start = _now(setting)
    with torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16"):
        y = network(x)
    seen = _now(setting)
    y.backward(torch.ones_like(y))
    returned = _now(setting)
    if optimizer is not None:
        optimizer.step()
    stepped = _now(setting)
    x.grad = None
    network.zero_grad()
    return seen - start, returned - seen, returned - start, stepped - start


def _evaluate(network: nn.Module, x: Tensor, setting: Setting) -> float:
    start = _now(setting)
    with torch.no_grad(), torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16"):
        network(x)
    return _now(setting) - start


def _now(setting: Setting) -> float:
    if setting.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(function: Callable[[], object], setting: Setting) -> int:
    """The most that the tensors made by a function hold at once."""
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of torch talks on every use
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is given back
        peak = max(peak, held)
    return peak


def strategies(names: Sequence[str], rank: int = 30) -> dict[str, Prepare]:
    """Strategies of ``conf/finetune`` by name, as training would build them.

    Args:
        names: Which; none means all.
        rank: That of ``svf_rank30``.

    Raises:
        ValueError: If one does not exist.
    """
    known = choices("finetune")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(
                f"strategy: there is no {name!r} in conf/finetune; did you mean {', '.join(near)}?"
            )
    ways = {}
    for name in names or known:
        overrides = [f"finetune={name}"] + ([f"finetune.rank={rank}"] if name == "svf_rank30" else [])
        ways[name] = build_part(compose(overrides, Path()), "finetune")
    return ways


def run(
    names: Sequence[str] = (), size: int = 241, batch: int = 2, rank: int = 30, setting: Setting = AS_IT_COMES
) -> str:
    """Measure strategies on a ResNet-50 and put them into a Markdown table.

    Args:
        names: Of the strategies; none means all that fit the network and whose packages are installed.
        size: Height and width of the images, in pixels.
        batch: Images.
        rank: That of ``svf_rank30``.
        setting: How they run.

    Raises:
        ValueError: If a number is too small, a strategy does not exist or does not fit, or the device or
            dtype is not there.
    """
    for name, value, least in (("size", size, 33), ("batch", batch, 1), ("rounds", setting.rounds, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; the benchmark needs at least {least}")
    if setting.device not in ("cpu", "cuda") or (setting.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {setting.device!r}; here there is cpu{_and_cuda()}")
    if setting.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {setting.dtype!r}; give float32 or bfloat16")
    ways = strategies(names, rank)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        costs, left_out = compare(
            resnet50(weights=None), ways, torch.randn(batch, 3, size, size), setting, skip=not names
        )
    finally:
        torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if setting.device == "cuda" else "one CPU thread"
    how = [where, setting.dtype] + ["channels last"] * setting.channels_last + ["compiled"] * setting.compiled
    title = (
        f"torch {torch.__version__}, {', '.join(how)}, ResNet-50, {batch} x {size} x {size}, "
        f"best of {setting.rounds}."
    )
    return "\n".join([title, "", *table(costs), *(["", *left_out] if left_out else [])])


def compare(
    backbone: nn.Module, ways: Mapping[str, Prepare], images: Tensor, setting: Setting, skip: bool = False
) -> tuple[list[tuple[str, Cost, Cost]], list[str]]:
    """The floor, the two other forms of SVF, and some strategies, each with the floor it took turns with.

    Args:
        backbone: Stays as it is.
        ways: Strategies by name.
        images: Shape ``(B, 3, H, W)``.
        setting: How they run.
        skip: Leave out what refuses the backbone, rather than raise.

    Returns:
        Names, costs and costs of the floor; and a sentence for each that was left out.
    """
    costs: list[tuple[str, Cost, Cost]] = []
    left_out = []
    every = {PUBLISHED: prepare_published, REBUILT: prepare_rebuilt, **ways}
    for name, way in track(every.items(), "measuring", total=len(every), unit="strategies"):
        try:
            pair = measure(backbone, {FLOOR: frozen.prepare, name: way}, images, setting)
        except ValueError as error:
            if not skip:
                raise ValueError(f"{name}: {error}") from None
            left_out.append(f"Without {name}: {error}.")
        else:
            if not costs:
                costs.append((FLOOR, pair[FLOOR], pair[FLOOR]))
            costs.append((name, pair[name], pair[FLOOR]))
    return costs, left_out


def table(costs: Sequence[tuple[str, Cost, Cost]]) -> list[str]:
    """Lines of a Markdown table: milliseconds, megabytes, and ratios.

    Args:
        costs: Of :func:`compare`.
    """
    published = {name: cost.memory for name, cost, _ in costs}[PUBLISHED]
    usual = costs[0][1].first
    lines = [
        "| | trained | forward | backward | step | training / floor | memory | memory / published "
        "| evaluation / frozen |",
        "|---" + "|---:" * 8 + "|",
    ]
    for name, cost, floor in costs:
        ratio = f"{cost.memory / published:.2f}" if cost.first == usual else ""
        times = (f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms" for seconds in cost[1:3])
        step = f"{1000 * cost.step:.{0 if cost.step >= 0.1 else 1}f} ms"
        label = name if cost.first == usual else f"{name} (from {cost.first})"
        lines.append(
            f"| {label} | {cost.trained:,} | {' | '.join(times)} | {step} "
            f"| {cost.training / floor.training:.2f} | {cost.memory:.0f} MB | {ratio} "
            f"| {cost.evaluation / floor.evaluation:.2f} |"
        )
    return lines


def _and_cuda() -> str:
    return " and cuda" if torch.cuda.is_available() else " alone (torch sees no GPU)"

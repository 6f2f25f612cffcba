"""Ways of keeping a convolution orthogonal: what each adds to one layer's training step, and what it achieves.

One 3x3 convolution of C to C channels (circular padding, batch 16, 16x16) learns the outputs of a random one. "none" is
the plain layer: what another provider takes longer is its cost. A penalty pulls the layer towards an isometry; a
parametrisation forces it to satisfy its own condition at every step. They promise different things, so the rows
"largest" and "smallest" hold the operator's singular values after 200 steps of the same regression, as the column
`error`: the distance from 1.

Optional packages, each left out with its reason: geotorch, deel-torchlip, orthogonium.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonet_fast import OrthoConv2d, OrthoRegularizer
from isonet_fast.diagnostics import singular_values
from isonet_fast.models.official import official_penalty

from . import rows
from .harness import Contender, Session, Workload, parser

CHANNELS = (64, 128, 256)
SIZE, BATCH, STEPS = 16, 16, 200
LR, MOMENTUM, COEFF = 0.05, 0.9, 0.1
NONE = "none"


class FlatConv(nn.Module):
    """A convolution whose weight is stored as the matrix (O, I k k), which parametrisations of matrices need."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shape = channels, channels, 3, 3
        self.weight = nn.Parameter(delta(channels).weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.weight.view(self.shape))


def delta(channels: int) -> OrthoConv2d:
    return OrthoConv2d(channels, channels, 3, padding=1, padding_mode="circular", bias=False)


def ocnn_kernel(conv: nn.Conv2d) -> Tensor:
    """||K K^T - I||^2 of the flattened kernel (Wang et al., CVPR 2020, section 3.3)."""
    matrix = conv.weight.flatten(1)
    return (matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device)).square().sum()


def ocnn_convolution(conv: nn.Conv2d) -> Tensor:
    """||Conv(K, K, padding=k - 1) - I_r0||^2, I_r0 the identity at the centre (Wang et al., CVPR 2020, eq. 9)."""
    products = F.conv2d(conv.weight, conv.weight, padding=2)
    target = torch.zeros_like(products)
    target[:, :, 2, 2] = torch.eye(len(products), device=products.device)
    return (products - target).square().sum()


class Training:
    """One layer, its optimizer and the regression that all share."""

    def __init__(
        self, layer: nn.Module, penalty: Callable[[Any], Tensor] | None, channels: int, device: torch.device
    ) -> None:
        self.layer, self.penalty = layer.to(device), penalty
        self.fused = OrthoRegularizer(layer, COEFF) if penalty is OrthoRegularizer else None
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=LR, momentum=MOMENTUM)
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        inputs = torch.randn(8, BATCH, channels, SIZE, SIZE, generator=generator)
        outputs = [F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), teacher) for x in inputs]
        self.data = [(x.to(device), y.to(device)) for x, y in zip(inputs, outputs, strict=True)]
        self.steps = 0

    def step(self) -> Tensor:
        x, y = self.data[self.steps % len(self.data)]
        self.steps += 1
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.layer(x), y)
        if self.penalty is not None and self.fused is None:
            loss = loss + COEFF * self.penalty(self.layer)
        loss.backward()
        if self.fused is not None:
            self.fused.accumulate_grad_()
        self.optimizer.step()
        return loss.detach()

    def operator(self) -> nn.Conv2d:
        """The convolution that the layer computes now."""
        with torch.no_grad():
            weight = self.layer.weight.detach().float().cpu()  # type: ignore[operator]
        channels = len(weight)
        weight = weight.view(channels, channels, -1).unflatten(2, 2 * (round((weight[0].numel() / channels) ** 0.5),))
        conv = nn.Conv2d(channels, channels, weight.shape[-1], bias=False)
        conv.weight = nn.Parameter(weight)
        return conv


def package(name: str) -> Any:
    return importlib.import_module(name)


def layer(provider: str, channels: int) -> tuple[nn.Module, Callable[[Any], Tensor] | None]:
    """The layer of this provider, and the penalty that goes with it. Raises ImportError without its package."""
    circular = {"padding": 1, "padding_mode": "circular", "bias": False}
    if provider in PENALTIES:
        return delta(channels), PENALTIES[provider]
    if provider == "torch orthogonal":
        return nn.utils.parametrizations.orthogonal(FlatConv(channels)), None
    if provider == "geotorch":
        flat = FlatConv(channels)
        package("geotorch").orthogonal(flat, "weight")
        return flat, None
    if provider == "torchlip spectral":
        return package("deel.torchlip").SpectralConv2d(channels, channels, 3, **circular), None
    module, name = {
        "orthogonium AOC": ("orthogonium.layers.conv.AOC", "AdaptiveOrthoConv2d"),
        "orthogonium SOC": ("orthogonium.layers.conv.adaptiveSOC", "AdaptiveSOCConv2d"),
    }[provider]
    own = circular | {"padding": 3 if provider.endswith("SOC") else 1}  # SOC's exponential of a 3x3 kernel is 7x7
    return getattr(package(module), name)(channels, channels, 3, **own), None


PENALTIES: dict[str, Any] = {
    NONE: None,
    "isonet_fast": OrthoRegularizer,
    "official": official_penalty,
    "OCNN kernel": ocnn_kernel,
    "OCNN convolution": ocnn_convolution,
}
PROVIDERS = (
    *PENALTIES,
    *("torch orthogonal", "geotorch", "torchlip spectral", "orthogonium AOC", "orthogonium SOC"),
)


def trainings(session: Session, channels: int, providers: Sequence[str]) -> dict[str, Training]:
    found = {}
    for provider in providers:
        torch.manual_seed(0)
        try:
            found[provider] = Training(*layer(provider, channels), channels, session.device)
        except ImportError as missing:
            session.say(f"left out: {provider}: {missing}")
    return found


def keep(session: Session, channels: int, found: dict[str, Training]) -> None:
    """Train each for 200 steps and record its largest and smallest singular value."""
    for provider, training in found.items():
        for values in session.case(f"{provider}, {channels} channels", functools.partial(trained, session, training)):
            session.say(f"{channels} channels, {provider}: singular values {values[-1]:.4f} to {values[0]:.4f}")
            record(session, channels, provider, values)


def trained(session: Session, training: Training) -> Tensor:
    """The singular values after all steps, descending."""
    for _ in range(2 if session.dry else STEPS):
        training.step()
    return singular_values(training.operator(), SIZE)


def record(session: Session, channels: int, provider: str, values: Tensor) -> None:
    stamp = {**rows.machine(session.device.type), "utc": rows.utc()}
    workload = Workload("peers", "", case(channels), "float32")._asdict()
    written = []
    for mode, distance in (("largest", values[0] - 1), ("smallest", 1 - values[-1])):
        numbers = {"mode": mode, "provider": provider, "error": f"{distance.item():.6g}"}
        written.append({**dict.fromkeys(rows.COLUMNS, ""), **stamp, **workload, **numbers})
    rows.append(session.path, written)


def case(channels: int) -> str:
    return f"3x3 {channels}->{channels}, batch {BATCH}, {SIZE}x{SIZE}"


def main(arguments: Sequence[str] | None = None) -> Session:
    options = parser(__doc__)
    options.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    options.add_argument("--without", nargs="+", default=(), choices=PROVIDERS, help="the slow ones take an hour")
    args = options.parse_args(arguments)
    session = Session("peers", args)
    providers = [provider for provider in PROVIDERS if provider not in args.without]
    for channels in (8,) if session.dry else args.channels:
        make = functools.partial(trainings, session, channels, providers)
        for found in session.case(f"{channels} channels", make):
            contenders = [Contender(provider, training.step) for provider, training in found.items()]
            session.compare(Workload("peers", "step", case(channels), "float32"), contenders, seconds=20.0)
        for found in session.case(f"{channels} channels", make):
            keep(session, channels, found)
    return session


if __name__ == "__main__":
    sys.exit(main().finish())

"""How exact each way of computing the penalty is: `python -m benchmarks.accuracy [--quick]`.

Relative error against float64 of the loss and of the gradient, for kernels at a distance of 1e-3 from an orthogonal
one, where G - I is a small difference of large numbers. The rows named isonet_fast run the Triton kernels (on the GPU,
or in Triton's interpreter), which compute 5x5 over frequencies; "isonet_fast, overlap" is the same over overlapping
taps. "tf32", "bf16" and "bf16x3" round operands so, and multiply and add exactly: what tensor cores would give at best.
"official" is the official code's convolution in float32, as the device multiplies it. The closed form
(ops/closed_form.py) and the compiled kernel (csrc/orthogonality_cpu.cpp, for small layers) compute in float32 over
overlapping taps or over frequencies. The orthogonal tap is the middle one, or one beside it. Rows go to
benchmarks/results/accuracy.csv, the figure to docs/accuracy.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ROOT

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are decorated
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import triton_interpreter

    triton_interpreter.repair()

from isonet_fast import reference
from isonet_fast.geometry import Layer
from isonet_fast.models.official import official_penalty
from isonet_fast.ops import closed_form, library, small_layers
from isonet_fast.problem import Problem

from . import rows

DISTANCE = 1e-3
LABELS = {  # provider: how the gram and then the gradient's product are computed
    "tf32": "TF32, TF32 (the official code under cuDNN)",
    "bf16": "bf16, bf16",
    "bf16x3": "bf16x3, bf16x3",
    "isonet_fast": "isonet_fast: bf16x3, bf16",
    "isonet_fast highest": 'isonet_fast, precision="highest": float32',
    "official": "official code: float32",
    "closed form, overlap": "closed form, overlapping taps: float32",
    "closed form, frequency": "closed form, frequencies: float32",
    "compiled kernel, overlap": "compiled kernel, overlapping taps: float32",
    "compiled kernel, frequency": "compiled kernel, frequencies: float32",
    "isonet_fast, overlap": "isonet_fast, overlapping taps: bf16x3, bf16",
}


class OverOffsets(Layer):
    """A layer that the Triton kernels compute over offsets whatever its kernel."""

    triton_form = "overlap"  # type: ignore[assignment]


class Size(NamedTuple):
    """A kernel of equal sides, and the place of its orthogonal tap in each dimension."""

    channels: int
    kernel: int
    tap: int
    dims: int = 2
    stride: int = 1

    @property
    def central(self) -> bool:
        return self.tap == self.kernel // 2

    @property
    def case(self) -> str:
        kernel = "x".join([str(self.kernel)] * self.dims)
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        tap = "" if self.central else f", tap {(self.tap,) * self.dims}"
        return f"{self.channels} channels, {kernel}{stride}{tap}"

    @property
    def layer(self) -> Layer:
        shape = (self.channels, self.channels, *[self.kernel] * self.dims)
        return Layer(shape, (self.stride,) * self.dims, (1,) * self.dims, 1, "isonet")

    @property
    def official(self) -> bool:
        """Whether the official code takes it."""
        return self.dims == 2 and self.kernel != 7 and (self.kernel - 1) % self.stride == 0


def central(*sizes: tuple[int, int], dims: int = 2, stride: int = 1) -> list[Size]:
    return [Size(channels, kernel, kernel // 2, dims, stride) for channels, kernel in sizes]


MATRIX_SIZES = [  # where every provider is measured
    *central((64, 1), (128, 1), (256, 1), (512, 1), (64, 3), (128, 3)),
    *central((32, 5), (64, 5)),
]
FLOAT32_SIZES = [  # where those are that compute in float32
    *central((16, 1), (32, 1)),
    *central((16, 2), (32, 2), (64, 2), (512, 2)),
    *central((16, 3), (32, 3), (256, 3), (512, 3)),
    *central((16, 4), (32, 4), (64, 4), (128, 4)),
    *central((16, 5), (128, 5), (256, 5), (512, 5)),
    *central((16, 6), (32, 6), (64, 6), (128, 6)),
    *central((16, 7), (32, 7), (64, 7), (128, 7), (256, 7)),
    *[Size(16, 3, 0), Size(32, 5, 1), Size(64, 5, 1)],
    *central((16, 3), (64, 3), (256, 3), (64, 9), dims=1),
    *central((16, 3), (32, 3), (64, 3), dims=3),
    *central((64, 3), (128, 3), (256, 3), (64, 4), (32, 5), (64, 7), stride=2),
]
FLOAT32 = ("official", "closed form", "compiled kernel")
Rounding = Callable[[Tensor], tuple[Tensor, ...]]


def tf32(x: Tensor) -> tuple[Tensor, ...]:
    bits = x.float().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return (rounded.view(torch.float32).double(),)


def bf16(x: Tensor) -> tuple[Tensor, ...]:
    return (x.bfloat16().double(),)


def bf16x3(x: Tensor) -> tuple[Tensor, ...]:
    hi = x.bfloat16().double()
    return hi, (x - hi).bfloat16().double()


ROUNDINGS: dict[str, Rounding] = {"tf32": tf32, "bf16": bf16, "bf16x3": bf16x3}


def product(a: Tensor, b: Tensor, rounding: Rounding) -> Tensor:
    """a @ b of rounded operands, exactly; of two planes each, without lo * lo."""
    left, right = rounding(a), rounding(b)
    return sum(left[i] @ right[j] for i in range(len(left)) for j in range(len(right)) if i + j < 2)  # type: ignore


def emulated(weight: Tensor, layer: Layer, rounding: Rounding) -> tuple[float, Tensor]:
    """Loss and gradient with every product rounded."""
    taps = weight.double().flatten(2).unbind(2)  # layers here have as many outputs as inputs
    names = [tuple(map(int, u)) for u in torch.cartesian_prod(*map(torch.arange, layer.kernel)).tolist()]
    grads = [torch.zeros_like(tap) for tap in taps]
    loss = 0.0
    for t in layer.offsets:
        pairs = [(i, names.index(v)) for i, u in enumerate(names) if (v := (u[0] + t[0], u[1] + t[1])) in names]
        gram = product(torch.cat([taps[i] for i, _ in pairs], 1), torch.cat([taps[j] for _, j in pairs], 1).T, rounding)
        residual = gram - (0 if any(t) else torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        loss += (1 if any(t) else 0.5) * residual.square().sum().item()
        for i, j in pairs:
            grads[i] += 2 * product(residual, taps[j], rounding)
            if any(t):
                grads[j] += 2 * product(residual.T, taps[i], rounding)
    return loss, torch.stack(grads, 2).view(weight.shape)


def kernels(weight: Tensor, layer: Layer, precision: str | None) -> tuple[float, Tensor]:
    from isonet_fast.kernels import orthogonality  # Triton may be missing

    problem = Problem((layer,), (1.0,), precision)
    loss, _, saved = orthogonality.forward([weight], problem, True)
    one = torch.ones((), device=weight.device)
    return loss.item(), orthogonality.backward(one, saved, [weight], problem)[0]


def closed(weight: Tensor, layer: Layer, form: str) -> tuple[float, Tensor]:
    grads: list[Tensor] = []
    losses = closed_form.evaluate([weight], [layer], [(form, layer.units(form))], lambda _, g: grads.append(g.clone()))
    return losses.item(), grads[0]


def official(weight: Tensor, layer: Layer) -> tuple[float, Tensor]:
    conv = nn.Conv2d(*weight.shape[:2], weight.shape[-1], stride=layer.stride[0], bias=False)
    conv.weight = nn.Parameter(weight)
    loss = official_penalty(conv)
    return loss.item(), torch.autograd.grad(loss, conv.weight)[0]


def compiled(weight: Tensor, layer: Layer, form: str) -> tuple[float, Tensor]:
    plan, waves, constants = small_layers.kernel_arguments([layer], [(form, layer.units(form))])
    grad = torch.empty_like(weight)
    losses = library.ops.orthogonality_small_([weight], [grad], plan, waves, [1.0], False)
    return (losses - constants).item(), grad


def near_orthogonal(size: Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(size.layer.shape)
    torch.nn.init.orthogonal_(weight[(..., *[size.tap] * size.dims)], generator=generator)
    noise = torch.randn(weight.shape, generator=generator)
    return weight + DISTANCE * noise * (weight.norm() / noise.norm())


def providers_of(size: Size, layer: Layer, device: torch.device) -> list[str]:
    chosen = [*LABELS]
    if size in FLOAT32_SIZES and device.type == "cpu":
        chosen = [provider for provider in chosen if provider.startswith(FLOAT32)]
    if not size.official:
        chosen.remove("official")
    if layer.triton_form == "overlap" and "isonet_fast, overlap" in chosen:  # it would be there twice
        chosen.remove("isonet_fast, overlap")
    if not (layer.small and device.type == "cpu" and library.compiled_for("cpu")):
        chosen = [provider for provider in chosen if not provider.startswith("compiled kernel")]
    return chosen


def measure(size: Size, seeds: int, device: torch.device, failures: list[str]) -> dict[str, tuple[float, float]]:
    """Median over the seeds of each provider's relative errors of (loss, gradient); a provider that fails is left out,
    and told to `failures`."""
    layer = size.layer
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in providers_of(size, layer, device)}
    for seed in range(seeds):
        weight = near_orthogonal(size, seed).to(device)
        exact = weight.double().requires_grad_()
        wanted = reference.orthogonality_loss(exact, stride=size.stride)
        (gradient,) = torch.autograd.grad(wanted, exact)
        for provider in [*errors]:
            try:
                loss, grad = computed(provider, weight, layer)
            except Exception as failure:  # a compiler's, a driver's: whatever it throws, the others are measured
                reason = str(failure).splitlines() or [""]
                failures.append(f"{size.case}: {provider}: {type(failure).__name__}: {reason[0]}")
                del errors[provider]
                continue
            error = (grad.double() - gradient).norm() / gradient.norm()
            errors[provider].append((abs(loss - wanted.item()) / wanted.item(), error.item()))
    return {p: (statistics.median(e[0] for e in es), statistics.median(e[1] for e in es)) for p, es in errors.items()}


def computed(provider: str, weight: Tensor, layer: Layer) -> tuple[float, Tensor]:
    """Loss and gradient."""
    if provider in ROUNDINGS:
        return emulated(weight, layer, ROUNDINGS[provider])
    name, _, form = provider.partition(", ")
    if name == "closed form":
        return closed(weight, layer, form)
    if name == "official":
        return official(weight, layer)
    if name == "compiled kernel":
        return compiled(weight, layer, form)
    if form == "overlap":
        layer = OverOffsets(layer.shape, layer.stride, layer.dilation, layer.groups, layer.penalty)
    return kernels(weight, layer, "highest" if name.endswith("highest") else None)


def record(results: dict[Size, dict[str, tuple[float, float]]], device: torch.device) -> None:
    now = rows.utc()
    triton = {"cuda": "kernels on the GPU", "cpu": "kernels in Triton's interpreter"}[device.type]
    how = {"isonet_fast": triton, "official": "PyTorch", "closed form": "PyTorch", "compiled kernel": "C++"}
    table = [
        dict.fromkeys(rows.COLUMNS, "")
        | rows.machine(device.type)
        | {
            "op": "orthogonality_accuracy",
            "provider": provider,
            "mode": mode,
            "case": size.case,
            "dtype": "float32",
            "layout": next((what for name, what in how.items() if provider.startswith(name)), "emulated"),
            "error": f"{error:.3e}",
            "utc": now,
        }
        for size, providers in results.items()
        for provider, pair in providers.items()
        for mode, error in zip(("loss", "gradient"), pair, strict=True)
    ]
    rows.append(rows.RESULTS / "accuracy.csv", table)


def draw(results: dict[Size, dict[str, tuple[float, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for n, axis in enumerate(axes):
        for index, (provider, label) in enumerate(LABELS.items()):
            for kernel, style in ((1, "o-"), (3, "s--")):
                drawn = [s for s in results if [s] == central((s.channels, kernel)) and provider in results[s]]
                at = sorted(drawn)
                if not at:
                    continue
                values = [results[size][provider][n] for size in at]
                axis.plot(
                    [size.channels for size in at],
                    values,
                    style,
                    color=f"C{index}",
                    label=label if kernel == 1 else None,
                )
        axis.set(xscale="log", yscale="log", xlabel="channels (solid: 1x1, dashed: 3x3)")
        axis.set(title=("loss", "gradient")[n] + ": relative error against float64")
        axis.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=7, title="gram, gradient product")
    figure.savefig(ROOT / "docs" / "accuracy.png", dpi=130)


def main() -> int:
    """Exit status: 0, or 3 where a provider failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, one seed; draws and records nothing")
    quick = parser.parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        warnings.simplefilter("ignore", RuntimeWarning)  # padding that is never used may hold anything
    sizes = central((64, 1), (128, 1), (64, 3)) if quick else [*MATRIX_SIZES]
    if not quick:
        sizes += central((256, 3), (512, 3)) if device.type == "cuda" else FLOAT32_SIZES
    results = {}
    failures: list[str] = []
    for size in sizes:
        told = len(failures)
        results[size] = measure(size, 1 if quick else 5, device, failures)
        for failure in failures[told:]:
            print(f"FAILED {failure}", file=sys.stderr, flush=True)
        for provider, (loss, gradient) in results[size].items():
            print(f"{size.case:30} {provider:26} loss {loss:.1e} gradient {gradient:.1e}", flush=True)
        if not quick:
            record({size: results[size]}, device)
    if not quick:
        if importlib.util.find_spec("matplotlib") is None:
            print("docs/accuracy.png is not drawn: Matplotlib is not installed")
        else:
            draw(results)
    return 3 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""`isonet-fast demo`: train a 32-layer network without normalisation or skips on real data, then time its step.

The network and the numbers are DESIGN's "known to train"; the same step in the official arithmetic, and with SReLU and
penalty deleted ("bare"), is timed beside it in the same process.
"""

from __future__ import annotations

import copy
import json
import math
import reprlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...models import isonet_cifar
from ...models.official import bare, official, official_penalty
from ...param_groups import param_groups
from ...regularizer import OrthoRegularizer
from ..data.digits import digits
from ..divergence import Diverged, first_nonfinite
from ..saving.files import disk_errors_naming, replacing

DEPTH, BATCH, LR, MOMENTUM, WEIGHT_DECAY, GAMMA, WARMUP = 32, 32, 0.005, 0.9, 1e-4, 1e-4, 2


def learning_rate(epoch: int, epochs: int, lr: float) -> float:
    """lr * epoch / WARMUP in the first epochs (counted from 1), x0.1 after 60 % and after 85 % of them."""
    if epoch < WARMUP:
        return lr * epoch / WARMUP
    return lr * 0.1 ** sum(epoch > round(part * epochs) for part in (0.6, 0.85))


def train(
    model: nn.Module, reg: OrthoRegularizer, data: tuple[Tensor, ...], epochs: int, lr: float
) -> Iterator[dict[str, float]]:
    """Train in place; after each epoch yields its loss, the penalty, the test accuracy and the seconds it took."""
    images, labels, test_images, test_labels = data
    optimizer = torch.optim.SGD(param_groups(model, lr, WEIGHT_DECAY), lr, MOMENTUM)
    base = [group["lr"] / lr for group in optimizer.param_groups]
    step = 0
    steps = epochs * math.ceil(len(images) / BATCH)
    bar = tqdm(total=steps, unit="step", desc="training", mininterval=_refresh())
    for epoch in range(1, epochs + 1):
        start, losses = time.perf_counter(), []
        for group, ratio in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = ratio * learning_rate(epoch, epochs, lr)
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH):
            step += 1
            x = images[batch]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels[batch])
            loss.backward()
            total = loss.item() + reg.accumulate_grad_().item()
            if not math.isfinite(total):
                bar.close()
                raise Diverged(step, first_nonfinite(model, x))
            optimizer.step()
            losses.append(total)
            bar.update()
        seconds = time.perf_counter() - start
        accuracy = evaluate(model, test_images, test_labels)
        with torch.no_grad():
            reg()
        row = {"loss": statistics.fmean(losses), "penalty": float(reg.last), "accuracy": accuracy, "seconds": seconds}
        postfix = {"epoch": f"{epoch}/{epochs}", "accuracy": f"{accuracy:.3f}", "loss": f"{row['loss']:.3f}"}
        bar.set_postfix(postfix, refresh=False)
        yield row
    bar.close()


def _refresh() -> float:
    """Seconds between two drawings of a bar: rarely in a log file."""
    return 0.1 if sys.stderr.isatty() else 10


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy."""
    model.eval()
    return (model(images).argmax(1) == labels).double().mean().item()


def time_steps(model: nn.Module, x: Tensor, y: Tensor, steps: int = 15, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of a training step: official arithmetic, ours and bare, interleaved."""

    def build(network: nn.Module, penalty: Callable[[nn.Module], Tensor] | None) -> Callable[[], None]:
        optimizer = torch.optim.SGD(param_groups(network, LR, WEIGHT_DECAY), LR, MOMENTUM)
        reg = OrthoRegularizer(network, GAMMA) if penalty is None else None

        def step() -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            if penalty is not None:
                loss = loss + GAMMA * penalty(network)
            loss.backward()
            if reg is not None:
                reg.accumulate_grad_()
            optimizer.step()
            if x.is_cuda:
                torch.cuda.synchronize()

        return step

    contenders = {
        "official": build(official(model), official_penalty),
        "isonet_fast": build(copy.deepcopy(model), None),
        "bare": build(bare(model), lambda network: torch.zeros((), device=x.device)),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in tqdm(range(warmup + steps), desc="timing", unit="round", mininterval=_refresh()):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if n >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Accuracy, loss and penalty by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    titles = {"accuracy": "test accuracy", "loss": "training loss (with penalty)", "penalty": "orthogonality penalty"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        axis.plot(range(1, len(history) + 1), [row[key] for row in history], marker="o", markersize=3)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    with replacing(path) as temporary, disk_errors_naming(path):
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def run(epochs: int = 20, output: Path = Path("runs/demo"), seed: int = 0, lr: float = LR) -> dict[str, Any]:
    """Train, time, write summary.json and training.png to `output`, print a table; returns the summary."""
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 <= seed < 2**32:  # what scikit-learn takes
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {reprlib.repr(seed)}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    try:  # what can fail fails before minutes of training, not after
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo draws with matplotlib: pip install 'isonet_fast[demo]'") from error
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, *test = (part.to(device) for part in digits(seed))
    model = isonet_cifar(DEPTH, in_channels=1).to(device)
    reg = OrthoRegularizer(model, GAMMA)
    print(f"isonet_cifar({DEPTH}): no normalisation, no skip connections; {len(images)} digits, device {device}")
    history = list(train(model, reg, (images, labels, *test), epochs, lr))
    step_ms = time_steps(model, images[:BATCH], labels[:BATCH])
    summary = {
        "network": "isonet_cifar",
        "depth": DEPTH,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "epochs": epochs,
        "seconds": sum(row["seconds"] for row in history),
        "test_accuracy": history[-1]["accuracy"],
        "penalty": history[-1]["penalty"],
        "step_ms": step_ms,
        "speedup": step_ms["official"] / step_ms["isonet_fast"],
    }
    plot(history, output / "training.png")
    with replacing(output / "summary.json") as temporary, disk_errors_naming(output / "summary.json"):
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    _print(summary, output)
    return summary


def _print(summary: dict[str, Any], output: Path) -> None:
    print(f"\ntest accuracy {summary['test_accuracy']:.4f} after {summary['epochs']} epochs", end="")
    print(f" ({summary['seconds']:.1f} s of training), penalty {summary['penalty']:.4g}\n")
    print(f"{'one training step':<22} {'ms':>8}")
    labels = {"official": "official arithmetic", "isonet_fast": "isonet_fast", "bare": "bare (the ceiling)"}
    for key, label in labels.items():
        print(f"{label:<22} {summary['step_ms'][key]:>8.1f}")
    print(f"\nspeedup over the official arithmetic: {summary['speedup']:.2f}x")
    print(f"written: {output / 'summary.json'}, {output / 'training.png'}")

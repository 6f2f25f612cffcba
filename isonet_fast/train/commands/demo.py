"""`isonet-fast demo`: train a 32-layer network without normalisation or skips on real data, then time its step.

It is a run of the preset isonet_digits. The same step in the official arithmetic, and with SReLU and penalty deleted
("bare"), is timed beside ours in the same process.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.official import bare, official, official_penalty
from ...param_groups import param_groups
from ...regularizer import OrthoRegularizer
from .. import config
from ..config import Config
from ..loop import Run
from ..metrics import progress
from ..saving.files import disk_errors_naming, replacing
from ..validation import to_device


def recipe(epochs: int, seed: int, lr: float | None) -> Config:
    """The preset isonet_digits, its milestones after 60 % and 85 % of the epochs; lr: None for the preset's own."""
    settings = [f"schedule.epochs={epochs}", f"schedule.milestones={[round(0.6 * epochs), round(0.85 * epochs)]}"]
    settings += [f"seed={seed}"] + ([] if lr is None else [f"optimizer.lr={lr!r}"])
    return config.load("isonet_digits", settings)


def time_steps(
    model: nn.Module, x: Tensor, y: Tensor, settled: Config, steps: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Median milliseconds of a training step: official arithmetic, ours and bare, interleaved."""
    lr, momentum, decay = (getattr(settled.optimizer, name) for name in ("lr", "momentum", "weight_decay"))
    gamma = settled.penalty.coeff

    def build(network: nn.Module, penalty: Callable[[nn.Module], Tensor] | None) -> Callable[[], None]:
        optimizer = torch.optim.SGD(param_groups(network, lr, decay), lr, momentum)
        reg = OrthoRegularizer(network, gamma) if penalty is None else None

        def step() -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            if penalty is not None:
                loss = loss + gamma * penalty(network)
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
    with progress(warmup + steps, 0, "timing", True) as bar:
        for n in range(warmup + steps):
            for name, step in contenders.items():
                start = time.perf_counter()
                step()
                if n >= warmup:
                    times[name].append(time.perf_counter() - start)
            bar.update()
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Accuracy, loss and penalty by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    titles = {"val_top1": "test accuracy (%)", "loss": "training loss", "penalty": "orthogonality penalty"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        axis.plot(range(1, len(history) + 1), [row[key] for row in history], marker="o", markersize=3)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    with replacing(path) as temporary, disk_errors_naming(path):
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def run(epochs: int = 20, output: Path = Path("runs/demo"), seed: int = 0, lr: float | None = None) -> dict[str, Any]:
    """Train, time, write summary.json and training.png to `output`, print a table; returns the summary."""
    settled = recipe(epochs, seed, lr)
    try:  # what can fail fails before minutes of training, not after
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo draws with matplotlib: pip install 'isonet_fast[demo]'") from error
    output.mkdir(parents=True, exist_ok=True)
    trained = Run(settled, output, keep=False)
    name, depth, device = settled.model.name, settled.model.depth, trained.device
    count = len(trained.source.train)
    print(f"{name}({depth}): no normalisation, no skip connections; {count} digits, device {device.type}", flush=True)
    last = trained.fit()
    with torch.no_grad():
        trained.reg()  # the penalty after the last step
    batch = next(trained.train_loader.batches())
    assert batch.images is not None
    step_ms = time_steps(trained.model, *to_device(batch.images, batch.labels, settled, device), settled)
    summary = {
        "network": name,
        "depth": depth,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "epochs": epochs,
        "seconds": sum(row["seconds"] for row in trained.rows),
        "test_accuracy": last["val_top1"] / 100,
        "penalty": float(trained.reg.last),
        "step_ms": step_ms,
        "speedup": step_ms["official"] / step_ms["isonet_fast"],
    }
    plot(trained.rows, output / "training.png")
    with replacing(output / "summary.json") as temporary, disk_errors_naming(output / "summary.json"):
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    _print(summary, output)
    return summary


def _print(summary: dict[str, Any], output: Path) -> None:
    print(f"\ntest accuracy {summary['test_accuracy']:.4f} after {summary['epochs']} epochs", end="")
    print(f" ({summary['seconds']:.1f} s of training), penalty {summary['penalty']:.4g}\n")
    print(f"{'one training step':<22} {'ms':>8}")
    labels = {"official": "official arithmetic", "isonet_fast": "isonet_fast", "bare": "bare (the lower bound)"}
    for key, label in labels.items():
        print(f"{label:<22} {summary['step_ms'][key]:>8.1f}")
    print(f"\nspeedup over the official arithmetic: {summary['speedup']:.2f}x")
    print(f"written: {output / 'summary.json'}, {output / 'training.png'}")

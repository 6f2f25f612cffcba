"""What is recorded of a network: first gradients, and three training steps with the official optimizer groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formula

Penalty = Callable[[], Tensor]


class Step:
    """One training step, held before the optimizer moves: what it computed, by parameter name."""

    def __init__(self, model: nn.Module, penalty: Penalty, gamma: float) -> None:
        model.zero_grad()
        device = next(model.parameters()).device
        self.logits = model(formula.images().to(device))
        cross_entropy = F.cross_entropy(self.logits, formula.labels().to(device))
        self.penalty = penalty()
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(self.penalty, list(parameters.values()), allow_unused=True)
        self.penalty_grads = {n: g for n, g in zip(parameters, grads) if g is not None}
        cross_entropy.backward()
        for name, grad in self.penalty_grads.items():
            parameters[name].grad += gamma * grad  # type: ignore[operator]
        self.grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        self.loss = (cross_entropy + gamma * self.penalty).item()
        self.logits = self.logits.detach()
        self.penalty = self.penalty.detach()


def train(
    model: nn.Module, penalty: Penalty, gamma: float, optimizer: torch.optim.Optimizer, steps: int
) -> Iterator[Step]:
    """Yield each step after its gradients are known and before the optimizer applies them.

    Dropout is off, the networks' only randomness.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for _ in range(steps):
        yield Step(model, penalty, gamma)
        optimizer.step()


def record(steps: list[dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """The golden entry of one network."""
    first = steps[0]
    streams = {name: n for n, (name, _) in enumerate(model.named_parameters())}
    return {
        "logits": first["logits"],
        "penalty": first["penalty"],
        "losses": [step["loss"] for step in steps],
        "parameters": {
            name: {
                "shape": list(p.shape),
                "grad": first["grads"][name],
                "penalty_grad": first["penalty_grads"].get(name),
                "after": formula.measure(p.detach(), streams[name]),
            }
            for name, p in model.named_parameters()
        },
    }


def summarise(step: Step, model: nn.Module) -> dict[str, Any]:
    grads, penalty_grads = {}, {}
    for stream, (name, _) in enumerate(model.named_parameters()):  # in this order: see formula.direction
        if name in step.grads:
            grads[name] = formula.measure(step.grads[name].cpu(), stream)
        if name in step.penalty_grads:
            penalty_grads[name] = formula.measure(step.penalty_grads[name].cpu(), stream)
    return {
        "logits": step.logits.flatten().tolist(),
        "penalty": step.penalty.item(),
        "loss": step.loss,
        "grads": grads,
        "penalty_grads": penalty_grads,
    }

"""One training step of one provider, and whether its loss and gradients are right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isonet_fast import OrthoRegularizer, param_groups
from isonet_fast.import_torchvision import import_torchvision
from isonet_fast.models.official import official

from .bench_orthogonality import penalised
from .bench_orthogonality import truth as penalty_truth

GAMMA, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-4
CHECKED = 4  # images that float64 is run on
TOLERANCE = {False: 1e-3, True: 0.1}  # by whether the network is in bfloat16: through fifty layers
LR = 1e-6  # the weights stay where the check found them, however many steps are timed


class Step:
    """zero_grad, loss (network under autocast, penalty in float32), backward, SGD: the official training step.

    penalty: added to the loss; regularize: ours, added to the gradients, in every `interval`-th step; neither: only the
    loss.
    """

    def __init__(
        self,
        network: nn.Module,
        half: bool,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        regularize: bool = False,
        wrap: Callable[[Callable], Callable] = lambda function: function,
        gamma: float = GAMMA,
        interval: int = 1,
    ) -> None:
        self.network, self.half, self.penalty, self.gamma = network, half, penalty, gamma
        self.regularizer = OrthoRegularizer(network, gamma, interval=interval) if regularize else None
        self.optimizer = torch.optim.SGD(param_groups(network, LR, WEIGHT_DECAY), LR, MOMENTUM)
        self.loss = wrap(self._loss)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            loss = F.cross_entropy(self.network(x), y)
        return loss if self.penalty is None else loss + self.gamma * self.penalty(self.network)

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Everything but the update: the loss, penalty included."""
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        loss = loss.detach()
        return loss if self.regularizer is None else loss + self.regularizer.accumulate_grad_()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.gradients(x, y)
        self.optimizer.step()

    def error(self, x: Tensor, y: Tensor, expected: dict[float, dict[str, Tensor]]) -> float:
        """The larger of the deviations at both gammas of `truth`."""
        args = self.network, self.half, self.penalty, self.regularizer is not None
        return max(deviation(Step(*args, gamma=g).measured(x, y), values) for g, values in expected.items())

    @property
    def resident(self) -> int:
        """Bytes of weights, gradients and momentum."""
        return 3 * sum(p.numel() * p.element_size() for p in self.network.parameters())

    def measured(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The loss and every gradient by name, in float64; without a search for the fastest convolutions."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            loss = self.gradients(x, y)
        grads = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        return {"loss": loss.double(), **{name: grad.double() for name, grad in grads.items()}}


def truth(model: nn.Module, x: Tensor, y: Tensor) -> dict[float, dict[str, Tensor]]:
    """Loss and gradients in float64, by gamma (0 and 1): official arithmetic, and the penalty by its definition.

    At the gamma of training the penalty's gradient would hide in the network's rounding.
    """
    wide = official(model).to(dtype=torch.float64, memory_format=torch.contiguous_format)
    network = Step(wide, False).measured(x.double().contiguous(), y)
    loss, grads = penalty_truth(penalised(wide))
    names = {id(module): f"{name}.weight" for name, module in wide.named_modules()}
    added = {names[id(conv)]: grad for conv, grad in zip(penalised(wide), grads, strict=True)}
    both = {name: grad + added[name] if name in added else grad for name, grad in network.items()}
    return {0.0: network, 1.0: both | {"loss": network["loss"] + loss}}


def deviation(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The larger of the loss's relative error and that of all gradients as one vector (2-norms)."""
    if result.keys() != expected.keys():
        raise ArithmeticError(f"gradients of other parameters: {sorted(result.keys() ^ expected.keys())[:4]}")
    names = [name for name in expected if name != "loss"]
    off = torch.stack([(result[n] - expected[n]).square().sum() for n in names]).sum()
    size = torch.stack([expected[n].square().sum() for n in names]).sum()
    loss = ((result["loss"] - expected["loss"]) / expected["loss"]).abs()
    return torch.stack([loss, (off / size).sqrt()]).max().item()


def flops(model: nn.Module, x: Tensor) -> float:
    """The FLOPs of the network's matrix products in one step: forward once, backward twice as much."""
    meta = copy.deepcopy(model).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(x.shape, device="meta"))
    return 3.0 * counter.get_total_flops()


def torchvision_resnet(depth: int) -> Callable[[], nn.Module] | None:
    """What makes a ResNet with BatchNorm; None where no torchvision fits this torch."""
    try:
        models = import_torchvision().models
    except ModuleNotFoundError:
        return None
    return getattr(models, f"resnet{depth}")

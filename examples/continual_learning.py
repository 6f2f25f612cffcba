"""Continual learning with frozen layers: digits 0 to 4 first, then 5 to 9, and the first task is not forgotten.

An isometry keeps what distinguishes images that it was not trained on, so its first layers can be frozen and used for
the next task. Frozen weights count in the penalty's value, and receive no gradient. Needs scikit-learn.

    python examples/continual_learning.py
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import isonet_fast as iso

Data = tuple[torch.Tensor, torch.Tensor]


def tasks() -> list[Data]:
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor((images - images.mean()) / images.std(), dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.as_tensor(labels)
    return [(images[labels // 5 == task], labels[labels // 5 == task] % 5) for task in (0, 1)]


def train(model: nn.Module, data: Data, steps: int) -> None:
    """Train every parameter that is not frozen."""
    reg = iso.OrthoRegularizer(model, coeff=1e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    images, labels = data
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        reg.accumulate_grad_()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    first_task, second_task = tasks()

    first = iso.models.isonet_cifar(8, width=8, num_classes=5, in_channels=1)
    train(first, first_task, steps)
    before = accuracy(first, first_task)

    second = copy.deepcopy(first)
    second.stem, second.s1, second.s2 = first.stem, first.s1, first.s2  # shared by both tasks, and frozen from now on
    for part in (second.stem, second.s1, second.s2):
        part.requires_grad_(False)
    train(second, second_task, steps)

    after = accuracy(first, first_task)
    print(f"first task {before:.3f}, after the second {after:.3f}; second task {accuracy(second, second_task):.3f}")
    assert before == after, "a frozen layer has changed"


if __name__ == "__main__":
    main()

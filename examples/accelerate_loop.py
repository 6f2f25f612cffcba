"""Accelerate with gradient accumulation: an isometric network on real digits.

Accelerate divides every micro-batch's loss by their number. So `reg()` belongs in the loss of *every* micro-batch: the
parts add up to the whole penalty once per optimizer step. Needs accelerate and scikit-learn.

    accelerate launch examples/accelerate_loop.py        (or plain python)
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import isonet_fast as iso


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400, help="micro-batches")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor((images - images.mean()) / images.std(), dtype=torch.float32).view(-1, 1, 8, 8)
    data = TensorDataset(images, torch.as_tensor(labels))

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = iso.models.isonet_cifar(14, width=8, in_channels=1)
    optimizer = torch.optim.SGD(iso.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 16, shuffle=True))
    reg = iso.OrthoRegularizer(accelerator.unwrap_model(model), coeff=1e-4)

    done, right, seen = 0, 0.0, 0
    while done < steps:
        for batch, target in loader:
            with accelerator.accumulate(model):
                output = model(batch)
                accelerator.backward(F.cross_entropy(output, target) + reg())
                optimizer.step()
                optimizer.zero_grad()
            done += 1
            if done > steps - 50:
                right, seen = right + (output.argmax(1) == target).sum().item(), seen + len(target)
            if done == steps:
                break
    accelerator.print(f"training accuracy of the last {seen} images {right / seen:.3f}, penalty {reg.last.item():.3g}")


if __name__ == "__main__":
    main()

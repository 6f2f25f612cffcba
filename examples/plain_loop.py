"""A plain training loop: an isometric network without normalisation on real digits.

Shows the three lines that an existing loop needs: `param_groups` (no weight decay on SReLU biases), `OrthoRegularizer`,
and `accumulate_grad_` between zero_grad and backward. Needs scikit-learn for the data.

    python examples/plain_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import isonet_fast as iso


def digits() -> list[torch.Tensor]:
    """Training images, test images, training labels, test labels: 1,797 images of 8x8."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) - images.mean()) / images.std()
    return [torch.as_tensor(part) for part in train_test_split(images.astype("float32"), labels, random_state=0)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, test_images, labels, test_labels = digits()

    model = iso.models.isonet_cifar(14, width=8, in_channels=1)
    reg = iso.OrthoRegularizer(model, coeff=1e-4)
    optimizer = torch.optim.SGD(iso.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)

    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        penalty = reg.accumulate_grad_()  # puts the penalty's gradient where the backward pass adds the loss's
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}, coeff * penalty {penalty.item():.2e}", flush=True)

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

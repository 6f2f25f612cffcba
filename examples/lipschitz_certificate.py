"""A classifier of digits with certified radii: no change of the image within the radius changes the answer.

SReLU and average pooling do not enlarge distances, and the "lorth" penalty keeps every other layer near an isometry. So
the product L of the layers' largest singular values, measured by `diagnostics.singular_values`, stays near 1. An answer
that leads by m is certified within m / (sqrt(2) L) in the Euclidean norm (Tsuzuku, Sato, Sugiyama, NeurIPS 2018).
Circular padding makes the singular values exact. Needs scikit-learn.

    python examples/lipschitz_certificate.py
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import isonet_fast as iso


def classifier() -> nn.Sequential:
    def conv(inputs: int, outputs: int, stride: int) -> nn.Module:
        how = dict(stride=stride, padding=1, padding_mode="circular", penalty="lorth")
        return iso.OrthoConv2d(inputs, outputs, 3, **how)

    head = iso.OrthoLinear(32 * 2 * 2, 10, penalty="lorth")
    return nn.Sequential(
        conv(1, 8, 1), iso.SReLU(8), conv(8, 32, 2), iso.SReLU(32), conv(32, 32, 2), iso.SReLU(32), nn.Flatten(), head
    )  # fmt: skip


def lipschitz(model: nn.Sequential) -> float:
    """An upper bound of the network's Lipschitz constant: the product of its layers' norms."""
    size, bound = 8, 1.0
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound *= iso.diagnostics.singular_values(layer, size)[0].item()
        size //= layer.stride[0] if isinstance(layer, nn.Conv2d) else 1
    return bound


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype("float32") / 16  # from 0 to 1
    images, test_images, labels, test_labels = map(torch.as_tensor, train_test_split(images, labels, random_state=0))

    model = classifier()
    reg = iso.OrthoRegularizer(model, coeff=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(10 * model(images[batch]), labels[batch])  # the factor asks for larger leads
        optimizer.zero_grad()
        (loss + reg()).backward()
        optimizer.step()

    bound = lipschitz(model)
    with torch.no_grad():
        scores = model(test_images)
    correct = scores.gather(1, test_labels.unsqueeze(1)).squeeze(1)
    best_other = scores.scatter(1, test_labels.unsqueeze(1), -math.inf).amax(1)
    radius = (correct - best_other) / (math.sqrt(2) * bound)
    print(f"Lipschitz bound {bound:.3f}, test accuracy {(radius > 0).float().mean():.3f}")
    for threshold in (0.05, 0.1, 0.2):
        print(f"certified within {threshold}: {(radius > threshold).float().mean():.3f}")


if __name__ == "__main__":
    main()

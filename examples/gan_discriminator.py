"""A GAN whose discriminator is kept close to an isometry by the "lorth" penalty; real digits.

"lorth" is the penalty for strided convolutions: it is 0 exactly where the operator is row- or column-orthogonal on the
inputs that its taps reach. The generator is plain. Needs scikit-learn.

    python examples/gan_discriminator.py
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import isonet_fast as iso


def discriminator() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = iso.OrthoConv2d(inputs, outputs, 3, stride=2, padding=1, penalty="lorth")
        return [conv, iso.SReLU(outputs, inplace=True)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 2 * 2, 1))


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32 * 2 * 2),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    digits = torch.as_tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # from -1 to 1

    judge, forger = discriminator(), generator()
    reg = iso.OrthoRegularizer(judge, coeff=1e-2)
    print(reg.summary())
    judging = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.99))
    forging = torch.optim.Adam(forger.parameters(), lr=1e-3, betas=(0.5, 0.99))

    for step in range(1, steps + 1):
        real = digits[torch.randint(len(digits), (64,))]
        fake = forger(torch.randn(64, 16))
        hinge = F.relu(1 - judge(real)).mean() + F.relu(1 + judge(fake.detach())).mean()
        judging.zero_grad()
        (hinge + reg()).backward()
        judging.step()

        forging.zero_grad()
        (-judge(fake).mean()).backward()
        forging.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: hinge loss {hinge.item():.3f}, penalty {reg.last.item():.3g}", flush=True)

    for row in iso.diagnostics.isometry_report(judge, (1, 8, 8)):
        if not row.excluded:
            print(f"layer {row.name}: singular values {row.smallest:.3f} to {row.largest:.3f}")


if __name__ == "__main__":
    main()

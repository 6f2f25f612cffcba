"""What training reaches when a penalty is the whole loss: `python -m benchmarks.which_penalty`, about a minute.

Each 3x3 layer starts from the delta kernel plus normal noise, and takes STEPS steps of gradient descent. Prints the
table of docs/which-penalty.md: the final penalty, and the smallest and the largest singular value of the operator on
32x32 inputs.
"""

from __future__ import annotations

import torch

from isonet_fast import OrthoConv2d
from isonet_fast.diagnostics import singular_values
from isonet_fast.geometry import PENALTIES, Penalty

CASES = ((16, 16, 1, 0.05), (16, 16, 1, 0.2), (16, 32, 1, 0.2), (16, 32, 2, 0.2))  # inputs, outputs, stride, noise
STEPS, LR = 3000, 0.02


def trained(penalty: Penalty, inputs: int, outputs: int, stride: int, noise: float) -> str:
    """One cell of the table."""
    torch.manual_seed(0)
    conv = OrthoConv2d(inputs, outputs, 3, stride, padding=1, bias=False, penalty=penalty)
    with torch.no_grad():
        conv.weight += noise * torch.randn_like(conv.weight)
    optimizer = torch.optim.SGD(conv.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = conv.orthogonality_loss()
        loss.backward()
        optimizer.step()
    values = singular_values(conv, 32)
    return f"{loss.item():.1g}, values {values.min():.2f} to {values.max():.2f}"


def main() -> None:
    print("| layer, deviation of the noise |", *(f'`"{penalty}"` |' for penalty in PENALTIES))
    print("|---" * (1 + len(PENALTIES)) + "|")
    for inputs, outputs, stride, noise in CASES:
        cells = [trained(penalty, inputs, outputs, stride, noise) for penalty in PENALTIES]
        print(f"| {inputs} to {outputs} channels, stride {stride}, {noise} |", *(f"{cell} |" for cell in cells))


if __name__ == "__main__":
    main()

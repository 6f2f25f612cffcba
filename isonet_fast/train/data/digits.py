"""scikit-learn's handwritten digits as training tensors: 1,797 real images that need no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def digits(seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (1437, 1, size, size) and labels, test images (360, 1, size, size) and labels.

    8x8 resized (bilinear), standardised with the mean and deviation of the training part, 80/20 stratified.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'isonet_fast[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train, test = (
        F.interpolate(torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8), size=size, mode="bilinear")
        for part in split[:2]
    )
    mean, deviation = train.mean(), train.std()
    train_labels, test_labels = (torch.tensor(part, dtype=torch.long) for part in split[2:])
    return (train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels

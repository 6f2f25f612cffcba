"""Lightning: a LightningModule that trains an isometric network on real digits.

Shows where the pieces go: the regularizer in `__init__`, its penalty in `training_step`, and `param_groups` in
`configure_optimizers`. Needs lightning and scikit-learn.

    python examples/lightning_loop.py
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import isonet_fast as iso


class Isometric(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = iso.models.isonet_cifar(14, width=8, in_channels=1)
        self.reg = iso.OrthoRegularizer(self.net, coeff=1e-4)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels) + self.reg()
        self.log("penalty", self.reg.last)
        return loss

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(iso.param_groups(self.net, lr=0.005, weight_decay=1e-4), momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    lightning.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32").reshape(-1, 1, 8, 8)
    parts = [torch.as_tensor(part) for part in train_test_split(images, labels, random_state=0)]
    train, test = TensorDataset(parts[0], parts[2]), TensorDataset(parts[1], parts[3])

    model = Isometric()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(train, 32, shuffle=True))
    (results,) = trainer.test(model, DataLoader(test, 450), verbose=False)
    print(f"test accuracy {results['accuracy']:.3f}")


if __name__ == "__main__":
    main()

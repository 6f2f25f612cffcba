"""timm: a network of its registry, trained by timm's own parts. The arguments are those of timm's train.py.

Shows `import isonet_fast.timm`, which registers the networks, and the one line that timm's training step needs: the
penalty's gradient between zero_grad and backward. timm's optimizers leave the SReLU biases without weight decay. Needs
timm, pillow, and scikit-learn for the digits that it trains on without --data-dir.

    python examples/timm_loop.py
    python examples/timm_loop.py --data-dir imagenet --model risonet50 --model-kwargs --input-size 3 224 224 \
        --drop 0.4 --epochs 100 --batch-size 256 --lr 0.1 --sched multistep --warmup-epochs 5 --workers 8
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits

import isonet_fast as iso
import isonet_fast.timm  # registers the networks; before timm, which cannot import a torchvision of another torch build

# isort: split
import timm
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, ParseKwargs, accuracy


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", help="DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE")
    parser.add_argument("--model", default="isonet_cifar")
    parser.add_argument("--model-kwargs", nargs="*", action=ParseKwargs, default=dict(depth=14, width=8))
    parser.add_argument("--input-size", type=int, nargs=3, default=(3, 8, 8))
    parser.add_argument("--drop", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--decay-milestones", type=int, nargs="+", default=(30, 60, 90))
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--coeff", type=float, default=1e-4, help="of the penalty: the one argument that timm lacks")
    return parser.parse_args()


def write_digits(folder: str) -> None:
    """scikit-learn's 1,797 images as timm reads them: every fourth for validation."""
    for n, (digit, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        parent = Path(folder, "train" if n % 4 else "validation", str(label))
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * digit.reshape(8, 8)).astype("uint8")).save(parent / f"{n}.png")


def train(args: argparse.Namespace, **augmentation: Any) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = {split: create_dataset("", root=args.data_dir, split=split) for split in ("train", "validation")}
    classes = len(data["train"].reader.class_to_idx)
    model = timm.create_model(args.model, num_classes=classes, drop_rate=args.drop, **args.model_kwargs).to(device)

    config = resolve_data_config(vars(args), model=model)
    common = dict(
        {key: config[key] for key in ("input_size", "mean", "std", "interpolation")},
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=device,
        use_prefetcher=device.type == "cuda",
    )
    batches = create_loader(data["train"], is_training=True, **augmentation, **common)
    validation = create_loader(data["validation"], crop_pct=config["crop_pct"], **common)

    reg = iso.OrthoRegularizer(model, coeff=args.coeff)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(batches))
    criterion = LabelSmoothingCrossEntropy(args.smoothing)

    for epoch in range(epochs):
        model.train()
        losses, top1 = AverageMeter(), AverageMeter()
        for images, labels in batches:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            reg.accumulate_grad_()  # puts the penalty's gradient where the backward pass adds the loss's
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(images))
        model.eval()
        with torch.no_grad():
            for images, labels in validation:
                top1.update(accuracy(model(images), labels)[0].item(), len(images))
        schedule.step(epoch + 1, top1.avg)
        print(f"epoch {epoch}: loss {losses.avg:.3f}, penalty {reg.last.item():.3g}, top-1 {top1.avg:.1f} %")


def main() -> None:
    args = parse()
    if args.data_dir:
        return train(args)
    with tempfile.TemporaryDirectory() as args.data_dir:
        write_digits(args.data_dir)
        train(args, no_aug=True)  # a mirrored digit is none


if __name__ == "__main__":
    main()

"""DistributedDataParallel: every process computes its share of the penalty.

The penalty depends only on the weights, so without `work_group` every process would compute the same. `work_group`
splits the work, and DDP's averaging of the gradients adds the shares up to the exact gradient. So `accumulate_grad_`
must come before the backward pass that synchronises the gradients. The data are real digits; needs scikit-learn.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import isonet_fast as iso


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor((images - images.mean()) / images.std(), dtype=torch.float32).view(-1, 1, 8, 8)
    mine, targets = images[rank::ranks].to(device), torch.as_tensor(labels)[rank::ranks].to(device)

    torch.manual_seed(0)
    model = DistributedDataParallel(iso.models.isonet_cifar(14, width=8, in_channels=1).to(device))
    reg = iso.OrthoRegularizer(model, coeff=1e-4, work_group=dist.group.WORLD)
    optimizer = torch.optim.SGD(iso.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)

    torch.manual_seed(rank)
    for _ in range(steps):
        batch = torch.randint(len(mine), (16,), device=device)
        optimizer.zero_grad()
        reg.accumulate_grad_()
        loss = F.cross_entropy(model(mine[batch]), targets[batch])
        loss.backward()
        optimizer.step()

    penalty = reg.last_total()  # the sum of all shares: every rank must ask
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(ranks)]
    dist.all_gather(others, weights)
    assert all(torch.equal(weights, other) for other in others), "the replicas went different ways"
    if rank == 0:
        print(f"{ranks} processes, loss {loss.item():.3f}, penalty {penalty.item():.3g}, the same weights everywhere")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

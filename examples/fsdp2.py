"""FSDP2 (`fully_shard`): weights are shards, and the penalty sees them whole.

The regularizer is made after `fully_shard`. It gathers the penalised weights in one float32 collective; with
`work_group` each process computes its share. Real digits; needs scikit-learn.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import isonet_fast as iso


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if gpu else "cpu")
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor((images - images.mean()) / images.std(), dtype=torch.float32).view(-1, 1, 8, 8)
    mine, targets = images[rank::ranks].to(device), torch.as_tensor(labels)[rank::ranks].to(device)

    torch.manual_seed(0)
    model = iso.models.isonet_cifar(8, width=8, in_channels=1).to(device)
    fully_shard(model, mesh=init_device_mesh(device.type, (ranks,)))
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

    penalty = reg.last_total()
    if rank == 0:
        print(f"{ranks} processes, loss {loss.item():.3f}, penalty {penalty.item():.3g}")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

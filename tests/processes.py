"""Checks that need several processes: the processes start once, every check's outcome is known by its name."""

import faulthandler
import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)  # of a collective: a rank that failed is not waited for longer


def outcomes(checks, ranks, folder):
    """Run `checks`, {name: picklable callable}, on every rank of a gloo group; {name: what failed, on which ranks}.

    A failed check leaves its ranks out of step: the next one has a new group, and is undisturbed.
    """
    folder = Path(folder)
    torch.multiprocessing.spawn(_rank, (checks, ranks, str(folder)), nprocs=ranks)
    reports = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    return {
        name: "\n".join(
            f"rank {rank} of {ranks}: {report[name]}" for rank, report in enumerate(reports) if report[name]
        )
        for name in checks
    }


def _rank(rank, checks, ranks, folder):
    faulthandler.enable()  # a crash names its place
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no host name is looked up
    report = {}
    for n, (name, check) in enumerate(checks.items()):
        if not dist.is_initialized():
            store = dist.FileStore(f"{folder}/store{n}", ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
        torch.manual_seed(0)
        try:
            check()
            dist.barrier()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
            dist.destroy_process_group()
    torch.save(report, f"{folder}/rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()

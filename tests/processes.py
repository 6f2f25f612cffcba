"""Processes of their own without the seconds that it takes to import torch: forked from one that has it imported.

For checks that need several processes: these start once, every check's outcome is known by its name.
"""

import faulthandler
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)  # of a collective: a rank that failed is not waited for longer
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets"])


def run_script(path, arguments, folder, before=None):
    """Run a program as `python path arguments` does, `before` (picklable) called first."""
    return _run(path, arguments, folder, before, [{}])


def run_ranks(ranks, path, arguments, folder):
    """Run a program on so many ranks, in the environment that torchrun gives them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}
    group |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    members = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run(path, arguments, folder, None, members)


def _run(path, arguments, folder, before, environments):
    """What all of them printed, and the first exit code that is not 0: None of a program that hangs."""
    context = multiprocessing.get_context(METHOD)
    logs = [folder / f"log-{n}" for n in range(len(environments))]
    processes = [
        context.Process(target=_script, args=(path, arguments, before, environment, log))
        for environment, log in zip(environments, logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = "".join(log.read_text() for log in logs)
    return subprocess.CompletedProcess([path, *arguments], next((code for code in codes if code != 0), 0), said)


def _script(path, arguments, before, environment, log):
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    if before is not None:
        before()
    runpy.run_path(str(path), run_name="__main__")


def outcomes(checks, ranks, folder):
    """Run `checks`, {name: picklable callable}, on every rank of a gloo group; {name: what failed, on which ranks}.

    A failed check leaves its ranks out of step: the next one has a new group, and is undisturbed.
    """
    folder = Path(folder)
    torch.multiprocessing.start_processes(_rank, (checks, ranks, str(folder)), ranks, start_method=METHOD)
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

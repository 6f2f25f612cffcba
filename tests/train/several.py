"""Commands of isonet-fast on several processes, many in one start of torchrun, because a start takes seconds.

As a program, on each rank: reads [[arguments, fault], ...] from the file named on its command line, does one after the
other, and exits with the code of the last. A fault [kind, rank, step] happens on one rank in one step: "SIGTERM" is
sent to it, or a "NaN" is in its images. With "noisy" in the kind every rank draws from its generator at every step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

Command = tuple[list[str], Any]


def torchrun(ranks: int, commands: list[Command], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands on so many gloo processes; standard output and error hold what all of them said."""
    plan = folder / f"plan-{ranks}.json"
    plan.write_text(json.dumps(commands))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *("-m", "tests.train.several", str(plan)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes then; killed, it would leave them behind
            raise AssertionError(f"{ranks} ranks hang: {process.communicate()}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


class Noisy(nn.Module):
    """A network that draws from the global generator at every step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        return self.inner(self.dropout(x))


def run(arguments: list[str], fault: Any, rank: int) -> int:
    from isonet_fast.train import loop
    from isonet_fast.train.commands.cli import main

    kind, where, when = fault or ("", -1, -1)
    real_step, real_build = loop.Run._train_step, loop.build_model

    def train_step(self: Any, batches: list) -> None:
        if rank == where and self.step == when - 1:
            if "SIGTERM" in kind:
                os.kill(os.getpid(), signal.SIGTERM)
            if "NaN" in kind:
                batches[-1].images.fill_(float("nan"))
        real_step(self, batches)

    def build(*args: Any) -> nn.Module:
        return Noisy(real_build(*args)) if "noisy" in kind else real_build(*args)

    with mock.patch.object(loop.Run, "_train_step", train_step), mock.patch.object(loop, "build_model", build):
        return main(arguments)


def program(plan: Path) -> int:
    from isonet_fast.train import distributed

    code = 0
    with distributed.processes() as processes:
        with mock.patch.object(distributed, "processes", lambda: nullcontext(processes)):
            for n, (arguments, fault) in enumerate(json.loads(plan.read_text())):
                try:
                    code = run(arguments, fault, processes.rank)
                except SystemExit as end:  # of the ranks that have nothing to say
                    code = int(end.code or 0)
                print(f"rank {processes.rank}, command {n}: {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(program(Path(sys.argv[1])))

"""The process that a fault is put into: `isonet-fast train` with something that goes wrong at a chosen step.

Two ways to start it. `python -m tests.faults.child` reads one plan per line and runs each in a process forked before
anything was computed, so the imports are paid once; it answers with the exit code. `python -m tests.faults.child PLAN`
runs one plan: what torchrun starts, once per rank.

A plan is JSON: {"arguments": of isonet-fast, "trace": a file that gets the number of every step begun, "output": a file
for what is printed, "faults": [one per start of the run, each null or {"name", "step", ...}]}. Nothing of this is in
the product: the faults sit in a subclass of its Run, or in a patched function of Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isonet_fast.train.commands import launch
from isonet_fast.train.commands.cli import main
from isonet_fast.train.loop import Run

RANK, RESTART = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def kill(run: Run, delay: float, rank: int = 0) -> None:
    """This process, `delay` steps from now: while computing, validating, writing a checkpoint."""
    if rank == RANK:
        _later(run, delay, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminate(run: Run, delay: float) -> None:
    """What a cluster sends before it takes the machine away."""
    _later(run, delay, lambda: os.kill(os.getpid(), signal.SIGTERM))


def signal_group(run: Any, delay: float, number: int, twice: bool) -> None:
    """What a terminal or a scheduler sends, to this process and those that load its data. `timeout` does so twice."""

    def send() -> None:
        if twice:
            os.kill(os.getpid(), number)
        os.killpg(0, number)

    run.pace = min(run.pace, 0.05)  # the first step of an epoch took the workers' start
    _later(run, delay, send)


def kill_worker(run: Run, delay: float, which: float) -> None:
    """One of the processes that load data."""
    workers = multiprocessing.active_children()
    worker = workers[int(which * len(workers))].pid
    assert worker is not None
    _later(run, delay, lambda: os.kill(worker, signal.SIGKILL))


def limit_files(run: Run, size: int) -> None:
    """From now on the kernel refuses to let a file grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def spoil_gradient(run: Run, value: str, which: float) -> None:
    """One number of one parameter's gradient, after the backward pass, only in this step."""

    def spoil(*_: Any) -> None:
        hook.remove()
        grads = [parameter.grad for parameter in run.model.parameters()]
        grad: Any = grads[int(which * len(grads))]
        own = grad.to_local() if hasattr(grad, "to_local") else grad
        own.view(-1)[int(which * own.numel())] = float(value)

    hook = run.optimizer.register_step_pre_hook(spoil)


def kill_at_rename(run: Run, nth: int, after: bool) -> None:
    """Before or after the nth renaming of a checkpoint from now on."""
    real, left = os.replace, nth

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        left -= Path(target).suffix == ".pt"
        if not left and not after:
            _die(f"before renaming to {Path(target).name}")
        real(source, target)
        if not left:
            _die(f"after renaming to {Path(target).name}")

    os.replace = replace


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (kill, terminate, signal_group, kill_worker, limit_files, spoil_gradient, kill_at_rename)
}


def _later(run: Any, delay: float, act: Callable[[], None]) -> None:
    """`delay` times the last step's duration from now."""
    seconds = delay * run.pace
    threading.Thread(target=lambda: (time.sleep(seconds), act()), daemon=True).start()


def _die(where: str) -> None:
    os.write(2, f"killed {where}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def carry_out(plan: dict[str, Any]) -> int:
    """Run the plan's arguments; its fault starts with the step that it names, counted from this start of the run."""
    fault = dict((plan["faults"] + [None] * (RESTART + 1))[RESTART] or {"name": "", "step": 0})
    name, at = fault.pop("name"), fault.pop("step")

    if name == "signal_group":
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    class Faulty(Run):
        begun, before, pace = 0, 0.0, 0.0  # pace: seconds from the last step's beginning to this one's

        def _train_step(self, batch: Any) -> None:
            self.begun += 1
            now = time.monotonic()
            self.pace, self.before = now - self.before, now
            if RANK == 0:
                with open(plan["trace"], "a") as file:
                    file.write(f"{self.step + 1}\n")
            if self.begun == at:
                FAULTS[name](self, **fault)
            super()._train_step(batch)

    launch.CLASSIFIER = dataclasses.replace(launch.CLASSIFIER, run=Faulty)
    return main(plan["arguments"])


def serve() -> None:
    """A forked process per line; the heavy imports come first."""
    for heavy in ("sklearn.datasets", "sklearn.model_selection", "torch._dynamo", "torch.utils.tensorboard"):
        with contextlib.suppress(ModuleNotFoundError):  # TensorBoard may not be installed
            importlib.import_module(heavy)
    for line in sys.stdin:
        plan = json.loads(line)
        pid = os.fork()
        if not pid:
            output = os.open(plan["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = 1
            try:
                code = carry_out(plan)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(carry_out(json.loads(sys.argv[1])))
    serve()

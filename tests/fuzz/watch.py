"""The processes of `make fuzz`: workers that try, and a parent that shows their progress and notices one that died."""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from .search import search

EVERY = 10.0  # seconds between two lines of progress
HANGS = 300.0  # seconds that no trial takes, a compilation included


def work(worker: int, args: argparse.Namespace, at: Any, calls: Any, found: Any) -> None:
    """The trials of one process: every `workers`-th number. `at` is the trial that runs, should it end the process."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    end = time.monotonic() + args.seconds

    def before(number: int) -> bool:
        at[worker] = number
        calls[worker] = (number - args.first) // args.workers
        return time.monotonic() < end

    last = args.first + args.calls if args.calls else sys.maxsize
    _, failed = search(args.seed, range(args.first + worker, last, args.workers), args.only, before)
    if failed is None:
        calls[worker] += 0 if not args.calls else 1
        return
    found.put(f"trial {failed.number} of seed {args.seed}: {failed.told()}")


class Watch:
    """The parent: starts the workers, shows their progress, and notices one that died or hangs."""

    def __init__(self, args: argparse.Namespace, work: Callable[..., None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.args = args
        self.at = context.Array("q", [args.first] * args.workers)
        self.calls = context.Array("q", [0] * args.workers)
        self.found = context.SimpleQueue()
        self.processes = [
            context.Process(target=work, args=(n, args, self.at, self.calls, self.found), daemon=True)
            for n in range(args.workers)
        ]
        self.start = time.monotonic()
        self.moved = dict.fromkeys(range(args.workers), (args.first, self.start))

    def run(self) -> int:
        for process in self.processes:
            process.start()
        try:
            trouble = self._wait()
        finally:
            for process in self.processes:
                process.kill()
        print(self._progress(), flush=True)
        print(trouble or "no failure", flush=True)
        return 1 if trouble else 0

    def _wait(self) -> str | None:
        """What went wrong, or None when every worker is done."""
        shown = self.start
        while True:
            if not self.found.empty():
                return self.found.get()
            for worker, process in enumerate(self.processes):
                if process.exitcode or self._hangs(worker):
                    return self._lost(worker, process.exitcode)
            if not any(process.is_alive() for process in self.processes):
                return None if self.found.empty() else self.found.get()
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                print(self._progress(), flush=True)
            time.sleep(0.1)

    def _hangs(self, worker: int) -> bool:
        now = time.monotonic()
        if self.at[worker] != self.moved[worker][0]:
            self.moved[worker] = self.at[worker], now
        return self.processes[worker].is_alive() and now - self.moved[worker][1] > HANGS

    def _lost(self, worker: int, exitcode: int | None) -> str:
        how = f"took more than {HANGS:.0f} seconds" if exitcode is None else f"ended the process, exit code {exitcode}"
        only = f" --only {' '.join(self.args.only)}" if self.args.only else ""
        return (
            f"trial {self.at[worker]} of seed {self.args.seed} {how}\n"
            f"python -m tests.fuzz --seed {self.args.seed} --first {self.at[worker]} --calls 1{only}"
        )

    def _progress(self) -> str:
        seconds, calls = time.monotonic() - self.start, sum(self.calls)
        return f"{seconds:5.0f} s  {calls:,} calls, {calls / seconds:.0f} a second"

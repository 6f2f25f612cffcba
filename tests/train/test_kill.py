"""SIGKILL at random moments, resumed each time: the same bits as a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from isonet_fast.train import checkpoint

from .conftest import SMALL
from .test_loop import rows, same

# Reads [target, delay, arguments] line by line and runs each in a process of its own, forked before anything has run:
# so the imports are paid once. A run with a target kills itself at a moment that the test draws, `delay` seconds after
# its step number `target` began: while computing, validating, or writing a checkpoint.
DRIVER = """
import contextlib, json, os, signal, sys, threading, time
import sklearn.datasets, sklearn.model_selection
with contextlib.suppress(ModuleNotFoundError):
    import torch.utils.tensorboard
from isonet_fast.train import loop
from isonet_fast.train.cli import main

real, steps = loop.Run._train_step, 0

def kill(delay):
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def run(target, delay, arguments):
    def train_step(self, batch):
        global steps
        steps += 1
        if steps == target:
            threading.Thread(target=kill, args=(delay,), daemon=True).start()
        real(self, batch)

    loop.Run._train_step = train_step
    return main(arguments)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        os._exit(run(*json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork are POSIX")
def test_sigkill_three_times(tmp_path: Path) -> None:
    settings = [*SMALL, "schedule.epochs=2", "data.batch_size=128", "checkpoint.every_steps=2"]  # 11 steps an epoch
    words = [word for setting in settings for word in ("--set", setting)]
    new = ["train", "--config", "isonet_digits", *words, "--output"]
    whole, parts, rng = tmp_path / "whole", tmp_path / "parts", random.Random()
    points = [(rng.randint(2, 7), rng.uniform(0, 0.1)) for _ in range(3)]
    resume = ["train", "--resume", str(parts)]
    plan = [(0, 0, [*new, str(whole)]), (*points[0], [*new, str(parts)])]
    plan += [(*point, resume) for point in points[1:]] + [(0, 0, resume)]

    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="".join(json.dumps(entry) + "\n" for entry in plan),
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads each time: the same order of additions
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["0", "-9", "-9", "-9", "0"], (points, done.stdout, done.stderr)
    assert done.stderr.count("resuming from") == 3
    same(*(checkpoint.load(run / "latest.pt") for run in (whole, parts)))
    same(*(checkpoint.load(run / "best.pt") for run in (whole, parts)))
    assert rows(whole) == rows(parts), points
    assert not list(parts.glob(".*.tmp*")), "what the killed processes left is swept up"

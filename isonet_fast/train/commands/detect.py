"""`isonet-fast detect`: Mask R-CNN on COCO, trained and evaluated; new or resumed as `train` is."""

from __future__ import annotations

import argparse

from ..detection.config import RULES, DetectionConfig
from ..detection.run import DetectionRun
from . import launch

KIND = launch.Kind(DetectionConfig, DetectionRun, RULES)


def run(args: argparse.Namespace) -> None:
    launch.run(args, KIND)

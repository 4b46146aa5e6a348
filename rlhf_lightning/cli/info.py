"""``python -m rlhf_lightning info``: what is installed, and which operators run natively on this machine.

The first thing to attach to a bug report. It imports torch and the extension, and reads every other version from the
package metadata.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from rlhf_lightning import __version__
from rlhf_lightning.ops import extension

_PACKAGES = ("lightning", "transformers", "jsonargparse", "safetensors", "torchmetrics", "tensorboard")


def main(arguments: Sequence[str]) -> int:
    """Print what is installed here; ``--json`` for machines."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_lightning info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    gathered = gather()
    print(json.dumps(gathered, indent=2) if options.json else _as_text(gathered))
    return 0

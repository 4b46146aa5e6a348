"""The command line: ``commands`` dispatches, ``training`` is the LightningCLI of fit, validate, test and predict."""

from rlhf_lightning.cli.commands import main

__all__ = ["main"]

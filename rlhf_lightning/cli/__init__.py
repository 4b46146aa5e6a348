"""The command line: ``commands`` dispatches, ``training`` holds the LightningCLI that fit, validate, test and predict use."""

from rlhf_lightning.cli.commands import main

__all__ = ["main"]

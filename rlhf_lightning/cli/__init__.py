"""The command line. ``commands`` runs commands; ``training`` is the LightningCLI of fit, validate, test and predict."""

from rlhf_lightning.cli.commands import main

__all__ = ["main"]

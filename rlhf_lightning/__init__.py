"""RLHF for language models, structured the PyTorch Lightning way.

Importing this package is fast: it imports neither torch, lightning nor transformers. Import what you need from the file
that defines it, for example ``from rlhf_lightning.modules.ppo import PPOModule``.
"""

__version__ = "0.1.0"

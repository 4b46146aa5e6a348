"""Callbacks and loggers of a run: metrics, samples, checkpoints, progress, the exported model."""

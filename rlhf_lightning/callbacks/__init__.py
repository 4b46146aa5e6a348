"""What a run leaves and shows: metrics, samples, checkpoints, progress, the exported model."""

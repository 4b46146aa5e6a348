"""The embedded example: a small world in which the true reward is known."""

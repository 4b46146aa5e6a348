"""The built-in demo: the whole pipeline in a small world in which the true reward is known."""

"""The parts that modules hold, each with one job; every one works without a Trainer."""

"""The parts that modules hold, each with one job."""

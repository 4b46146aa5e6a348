"""What all benchmarks share: one clock, one reader of memory, one worker process, one report."""

"""What `bench_training.py` and its companions run: our modules, the peers, and the machine's limit."""

"""What `bench_training.py` and its companions run: our modules, the peers, and how both are measured."""

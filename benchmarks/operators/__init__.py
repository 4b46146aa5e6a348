"""The stages of ``bench_operators.py``: cases, inputs, entrants, clock, worker, rounds, report, plots."""

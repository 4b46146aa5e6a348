"""The stages of ``bench_operators.py``: cases, inputs, sides, measure, report."""

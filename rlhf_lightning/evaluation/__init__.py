"""Compares policies: win rates, KL, perplexity, charts and the report."""

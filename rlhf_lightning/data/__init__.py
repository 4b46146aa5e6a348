"""Reads files of human judgements and makes checked rows, tokens and batches of them."""

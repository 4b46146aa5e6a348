"""From files of human judgements to checked rows, tokens and batches."""

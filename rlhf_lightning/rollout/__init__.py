"""Prompts to sampled responses with their log-probs."""

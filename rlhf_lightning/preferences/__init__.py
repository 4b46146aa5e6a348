"""Simulates human feedback: samples candidates to compare, and ranks them as an annotator would."""

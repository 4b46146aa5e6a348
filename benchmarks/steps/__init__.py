"""The stages of ``profile_steps.py``: what is trained, the clock, the head as people write it, the report."""

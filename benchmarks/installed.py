"""The peers that ``benchmarks/peers/install.py`` has set up, a folder each, and why one is not there."""

from __future__ import annotations

from pathlib import Path

INSTALLED = Path(__file__).resolve().parent.parent / "build" / "peers"


def missing(folder: str | None) -> str | None:
    """Why there is nothing to start in the peer's folder; None where there is, or where no folder is asked for."""
    if folder is None or (INSTALLED / folder).is_dir():
        return None
    reason = INSTALLED / f"{folder}.failed"
    if reason.exists():
        return "not installed: " + reason.read_text(encoding="utf-8").strip()
    return f"not installed: python benchmarks/peers/install.py {folder}"

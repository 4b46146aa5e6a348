"""Text of others (models, data files) made fit to be shown."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Text without control characters (a model may emit terminal escapes), line breaks and tabs kept."""
    return "".join(
        character for character in text if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf")
    )

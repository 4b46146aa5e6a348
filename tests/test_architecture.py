"""docs/architecture.md is what docs/architecture.py makes of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python docs/architecture.py"

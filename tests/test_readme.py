"""What the README shows is true: its commands, its files, its tree, its code."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from rlhf_lightning.cli.commands import _COMMANDS
from rlhf_lightning.cli.configs import shipped_configs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    without = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", without, flags=re.M)
    return fenced + [re.sub(r"^ {4}", "", block, flags=re.M).strip("\n") for block in indented if block.strip()]


def commands(text: str) -> list[str]:
    """Every shown command line: in blocks, and in inline code."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line.strip() for line in lines if re.match(r"\s*(make|python -m rlhf_lightning|bash|\.ci/run)\b", line)]


def test_the_first_command_comes_early() -> None:
    before = README[: README.index("    make demo")]
    assert len(before.split()) <= 60


def test_the_readme_has_no_badges_and_shows_the_report() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert images == ["docs/demo_report.png"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shown_commands_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for line in commands((ROOT / document).read_text(encoding="utf-8")):
        words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[:3] == ["python", "-m", "rlhf_lightning"] and len(words) > 3 and not words[3].startswith("--"):
            names = (words[3], " ".join(words[3:5]))
            assert words[3] == "COMMAND" or any(name in _COMMANDS for name in names), line
        for option, value in itertools.pairwise(words):
            if option == "--config" and not value.startswith("runs/"):
                written_above = f"here `{value}`" in README
                assert written_above or value in shipped_configs() or (ROOT / value).exists(), line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    names = re.findall(r"`((?:rlhf_lightning|tests|configs|csrc|docs|examples|benchmarks|\.ci)/[\w./-]*)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    missing = [name for name in names + links if not (ROOT / name).exists()]
    assert not missing


def tree_entries() -> list[Path]:
    """The paths of the README's tree, from its indentation."""
    (block,) = [block for block in code_blocks(README) if block.startswith("rlhf_lightning/")]
    entries: list[Path] = []
    folders: list[tuple[int, Path]] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = (folders[-1][1] if folders else Path()) / name
        entries.append(path)
        if name.endswith("/"):
            folders.append((indent, path))
    return entries


def test_the_tree_is_the_real_one() -> None:
    entries = tree_entries()
    missing = [str(entry) for entry in entries if not (ROOT / entry).exists()]
    assert not missing
    shown = {entry.parts[1] for entry in entries if entry.parts[0] == "rlhf_lightning" and len(entry.parts) > 1}
    real = {
        path.name
        for path in (ROOT / "rlhf_lightning").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.name not in ("__init__.py", "__main__.py")
    }
    assert shown == real


def test_every_stage_of_the_table_names_its_command_and_its_file() -> None:
    rows = [line for line in README.splitlines() if line.startswith("|") and "python -m" in line]
    assert len(rows) >= 6
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert (ROOT / cells[2].strip("`")).exists(), row

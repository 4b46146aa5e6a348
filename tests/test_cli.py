"""The command line: what it answers to good and bad input, and with which exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lightning import __version__
from rlhf_lightning.cli import main
from rlhf_lightning.cli.configs import find_config, keys_with_lines, resolve_configs, shipped_configs
from rlhf_lightning.cli.suggestions import did_you_mean
from rlhf_lightning.errors import InputError


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was said on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# The top level


def test_help_lists_the_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands = ("fit", "validate", "test", "predict", "generate", "evaluate", "agreement", "preferences export", "info")
    for command in (*commands, "preferences import", "data check", "demo"):
        assert f"  {command} " in text
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"rlhf_lightning {__version__}"


def test_an_unknown_command_is_an_input_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "unknown command 'fti' (did you mean fit?)" in error_of(capsys)


def test_train_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "(did you mean fit?)" in capsys.readouterr().err


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit\x1b[2J\u202e"]) == 2
    assert main(["fit", "--config", "a\x1b]0;title\x07.yaml"]) == 2
    said = capsys.readouterr().err
    assert "--config a]0;title.yaml: no such file" in said
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said


# Config files before parsing


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_shipped_config_is_found_unless_a_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("ppo.yaml") == shipped_configs()["ppo.yaml"]
    write(tmp_path / "ppo.yaml", "trainer: {}\n")
    assert find_config("ppo.yaml") == Path("ppo.yaml")


def test_a_missing_config_names_the_nearest_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--config pppo.yaml: no such file.*did you mean ppo.yaml"):
        find_config("pppo.yaml")


def test_configs_are_resolved_in_both_spellings(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.yaml", "a: 1\n"), write(tmp_path / "two.yaml", "b: 1\n")
    arguments, paths = resolve_configs(["fit", "--config", str(one), f"--config={two}", "--data.path", "x"])
    assert arguments == ["fit", "--config", str(one), "--config", str(two), "--data.path", "x"]
    assert paths == [one, two]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  init_args:\n    kl_coef: 1\n    lam: 1\n    kl_coef: 2\n", r":5: model.init_args.kl_coef is given"),
        ("a: 1\nb: 2\na: 3\n", r":3: a is given twice \(first in line 1\)"),
        ("a:\n- b: 1\n  b: 2\n", r":3: a.b is given twice"),
        ("- 1\n- 2\n", "expected `key: value` lines"),
        ("a: [1\nb: 2\n", r":\d: not valid YAML"),
        ("# nothing\n", r": this config has no line; leave it out"),
        ("a: 1\ntrainer: [[]]\n", r":2: trainer: expected its options as `key: value` lines, got a list"),
    ],
)
def test_faults_in_a_config_are_named_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(InputError, match=said) as caught:
        resolve_configs(["fit", "--config", str(path)])
    assert str(path) in str(caught.value)


def test_a_config_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match=r"c.yaml: not UTF-8 \(byte 3\)"):
        resolve_configs(["fit", "--config", str(tmp_path / "c.yaml")])


def test_configs_from_the_network_are_not_read() -> None:
    with pytest.raises(InputError, match="no such file"):
        resolve_configs(["fit", "--config", "https://example.org/ppo.yaml"])


def test_keys_have_lines_and_no_init_args(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "model:\n  class_path: X\n  init_args:\n    kl:\n      coef: 1\n")
    assert ("model.kl.coef", 5) in keys_with_lines(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("kl_coeff", " (did you mean --model.kl.coef?)"),
        ("model.kl_coeff", " (did you mean --model.kl.coef?)"),
        ("trainer.max_epoch", " (did you mean --trainer.max_epochs?)"),
        ("num_train_epochs", " (did you mean --trainer.max_epochs?)"),
        ("trainer.epochs", " (did you mean --trainer.max_epochs?)"),
        ("kl_beta", " (did you mean --model.kl.coef?)"),
        ("data.file", " (did you mean --data.path?)"),
        ("banana", ""),
    ],
)
def test_suggestions(name: str, hint: str) -> None:
    assert did_you_mean(name, ["model.kl.coef", "trainer.max_epochs", "data.path"], "--") == hint


# The plain commands


@pytest.mark.parametrize(
    "command", ["data check", "evaluate", "demo", "info", "data", "preferences", "preferences import"]
)
def test_usage_says_how_the_command_is_typed(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m rlhf_lightning {command} ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate"], "the following arguments are required: --policies, --prompts"),
        (["evaluate", "--policies", "a", "--prompts", "b", "--rewrd", "c"], "did you mean --reward?"),
        (["evaluate", "--policies", "a", "--promts", "b"], "unrecognized arguments: --promts (the following"),
        (["evaluate", "--policies", "a", "--promts", "b"], "did you mean --prompts?"),
        (["evaluate", "--policies", "a", "--prompts"], "argument --prompts: expected at least one argument"),
        (["data"], "data: which command? There is data check"),
        (["preferences"], "preferences: which command? There is preferences export and preferences import"),
        (["preferences", "exprot"], "unknown command 'preferences exprot' (did you mean preferences export?)"),
        (["data", "chekc"], "unknown command 'data chekc' (did you mean data check?)"),
        (["info", "--jsn"], "did you mean --json?"),
        (["data", "check", "--jso", "x", "f"], "did you mean --json?"),
        (["demo", "--seeds", "1"], "did you mean --seed?"),
    ],
)
def test_the_plain_commands_say_what_is_wrong_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in error_of(capsys)

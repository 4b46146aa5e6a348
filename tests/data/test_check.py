"""``data check``: hand-counted reports, exit codes, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata

import pytest

from rlhf_lightning.data.check import check, main
from rlhf_lightning.data.report import FileReport, Report, render

ROWS = [
    {"prompt": "p", "chosen": "long answer", "rejected": "short", "by": "ann"},
    {"prompt": "p", "chosen": "short", "rejected": "long answer"},
    {"prompt": "q", "chosen": "same", "rejected": "size"},
    {"prompt": "q", "chosen": "same", "rejected": "size"},
    {"prompt": "r", "chosen": "a", "rejected": ""},
    {"prompt": "s", "completions": ["abc", "d", "e"], "ranks": [1, 2, 2]},
]


def test_a_report_is_what_one_counts_by_hand(write):
    report = check([write(ROWS), write([{"prompt": "q", "completion": "x"}, {"prompt": "z"}], "other.jsonl")])
    first, second = report.files
    assert (first.rows, first.usable, first.refused, first.pairs, first.prompts) == (6, 5, [], 6, 3)
    assert (first.duplicates, first.contradictory, first.dropped) == (1, 1, {"empty response": 1, "ties": 1})
    assert (first.forms, first.columns) == ({"pair": 4, "ranking": 1}, ["by"])
    assert (first.longer_wins, first.equally_long) == (pytest.approx((3 + 0.5 * 2) / 6), 2)
    assert (first.prompt_lengths.longest, first.response_lengths.longest) == (1, 11)
    assert (second.forms, second.longer_wins) == ({"demonstration": 1, "prompt": 1}, None)
    assert [leak["prompts"] for leak in report.leaks] == [1]


def test_a_file_that_cannot_be_read_has_no_table(capsys, tmp_path):
    assert main([str(tmp_path / "none.jsonl")]) == 2
    said = capsys.readouterr().out.split()
    assert "distinct" not in said and "refused" in said


def test_rows_are_repeated_where_training_takes_them_for_the_same(write):
    rows = [{"prompt": "p", "answer": str(i)} for i in (1, 2, 2)]
    (file,) = check([write(rows)]).files
    assert file.duplicates == 1


def test_answers_under_another_name_are_advised(write):
    (file,) = check([write([{"prompt": f"p{i}", "response": "r"} for i in range(3)])]).files
    assert any("--columns completion=response" in line for line in file.advice)
    (file,) = check([write([{"prompt": "p", "completion": "c", "response": "r"}])]).files
    assert not any("completion: response" in line for line in file.advice)


def test_labels_that_are_all_the_same_are_advised(write):
    rows = [{"prompt": f"p{i}", "completion": "a", "label": i == 0} for i in range(4)]
    assert check([write(rows)]).files[0].advice == []
    told = "every label (3) is false, so KTO has no contrast to learn from; add rows of label true"
    assert check([write(rows[1:])]).files[0].advice == [told]


def test_other_names_of_system_are_advised_but_not_beside_it(write):
    for name in ("system_prompt", "system_message", "sys"):
        (line,) = (
            check([write([{name: "be kind", "prompt": f"p{i}", "completion": "c"} for i in range(3)])]).files[0].advice
        )
        assert line.endswith(f"looks like 'system', but is not read as it; --columns system={name} does so")
    both = {"system": "be kind", "system_prompt": "be kind", "prompt": "p", "completion": "c"}
    assert check([write([both])]).files[0].advice == []  # --columns would be refused


def test_an_answer_that_a_form_does_not_read_is_not_told_to_be_renamed_to_itself(write):
    row = {"prompt": "p", "completion": "a", "chosen": "a", "rejected": "b"}
    told = "column 'completion' of 1 rows is not used in training; only rewards get it"
    assert check([write([row])]).files[0].advice == [told]


def test_the_forms_are_listed_once_where_no_key_is_known(write, capsys):
    main([write([{"prompt": "p", "chosen": "a"}])])
    assert "accepted forms" not in capsys.readouterr().out
    main([write([{"query": "q", "good": "a"}, {"good": "a", "id": 3}])])
    printed = capsys.readouterr().out
    assert printed.count("accepted forms") == 1 and "  prompt+chosen+rejected\n" in printed


def test_labels_are_counted(write, capsys):
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False, True)]
    report = check([write(rows)]).files[0]
    assert (report.desirable, report.duplicates, report.forms, report.columns) == (2, 1, {"labelled": 3}, [])
    main([write(rows)])
    assert "labelled desirable" in capsys.readouterr().out


def test_good_files_exit_with_0_and_are_printed(write, capsys):
    assert main([write(ROWS)]) == 0
    printed = capsys.readouterr().out
    assert "rows.jsonl" in printed and "66.7%" in printed and "no row is refused" in printed


def test_refused_rows_are_listed_counted_and_exit_with_2(write, capsys, tmp_path):
    path = write([{"prompt": 1}] * 23 + ROWS)
    target = tmp_path / "report.json"
    assert main([path, str(tmp_path / "absent.jsonl"), "--json", str(target)]) == 2
    printed = capsys.readouterr().out
    assert f"refused 23 rows, the first: {path}:1: key 'prompt': must be" in printed and f"{path}:2:" not in printed
    assert "24 refused" in printed
    report = json.loads(target.read_text())
    assert len(report["files"][0]["refused"]) == 23 and report["files"][0]["usable"] == 5
    assert "cannot be read" in report["files"][1]["refused"][0]


def test_rows_that_are_kept_are_noted_below_the_table(write, capsys):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    main([write([{"prompt": "other", "messages": messages}, {"prompt": "p", "completion": " "}])])
    printed = capsys.readouterr().out
    assert "dropped: empty response" in printed and "dropped: prompt" not in printed
    assert "noted rows.jsonl: prompt ignored, since the row's own conversation does not have it: 1" in printed


def test_a_table_of_a_narrow_terminal_keeps_its_names_whole_and_its_labels_short(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    files = [write(ROWS, f"{'preferences' * 2}{i}.jsonl") for i in range(3)]
    main(files)
    tables = capsys.readouterr().out.partition("prompt leak")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert [line.split() for line in tables.splitlines() if ".jsonl" in line] == [  # as many side by side as fit
        ["preferencespreferences0.jsonl"],
        ["preferencespreferences1.jsonl"],
        ["preferencespreferences2.jsonl"],
    ]
    report = FileReport("rows.jsonl", rows=2, dropped={"a reason that needs far more than the width of a label": 2})
    render(Report("characters", [report], []))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rows.jsonl"] and lines[4].startswith("  dropped: a reason that needs")
    assert lines[5].startswith("    more than the width of a label")


def test_a_file_of_which_every_row_is_dropped_is_no_good_file(write, capsys):
    path = write([{"prompt": f"p{i}", "chosen": "a", "rejected": "a"} for i in range(8)])
    assert main([path]) == 2
    printed = capsys.readouterr().out
    assert "rows.jsonl: no row is left to train on of 8 read (equal responses: 8)" in printed
    assert "no row is refused" not in printed


def test_an_empty_file_is_refused(write, capsys):
    assert main([write("")]) == 2
    assert "contains no rows" in capsys.readouterr().out


def test_text_that_looks_like_markup_is_printed_as_it_is(write, capsys):
    main([write([{"prompt": "p", "[red]": 1}], "[bold].jsonl")])
    printed = capsys.readouterr().out
    assert "[red]" in printed and "[bold].jsonl" in printed


def test_text_of_files_cannot_steer_the_terminal(write, capsys):
    escape = "\x1b]0;title\x07"
    rows = [{"prompt": "p", f"name{escape}": 1}, {"prompt": "p", "messages": f"{escape}", f"other{escape}": 2}]
    rows.append({"messages": [{"role": f"user{escape}", "content": "a"}]})
    main([write(rows, "rows\x1b[31m.jsonl")])
    printed = capsys.readouterr().out
    assert "name" in printed and "rows[31m.jsonl" in printed
    assert not {c for c in printed if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}


def test_lengths_in_tokens(write, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = check([write(ROWS)], str(tmp_path / "tokenizer"))
    assert report.unit == "tokens"
    assert report.files[0].response_lengths.longest == max(
        len(tokenizer(text).input_ids) for text in ("long answer", "short", "same", "size", "abc")
    )


def test_what_the_template_makes_of_rows_is_told_with_a_tokenizer(write, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    drops = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(drops)
    user, answer = {"role": "user", "content": "p", "name": "Ann"}, {"role": "assistant", "content": "a"}
    thought = {"role": "assistant", "content": "<think>long</think>b"}
    path = write([{"messages": [user, thought, user, answer]}, {"messages": [user, {**answer, "reasoning": "c"}]}])
    assert main([path, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    printed = capsys.readouterr().out
    assert "does not read reasoning of message 1" in printed and "drops <think>…</think> from 1 of 3 resp" in printed
    assert "message with key 'name', which the chat template does not read: 3" in printed


def test_a_report_is_written_whole_whatever_a_file_is_called(write, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"x\xff.jsonl")
    os.replace(write([*ROWS, {"prompt": 3}]), path)
    target = tmp_path / "absent" / "report.json"
    assert main([str(path), "--json", str(target)]) == 2
    (file,) = json.loads(target.read_text(encoding="utf-8"))["files"]
    assert file["path"] == f"{tmp_path}/x?.jsonl" and len(file["refused"]) == 1
    assert capsys.readouterr().out.encode("utf-8").count(b"x?.jsonl") >= 2  # a heading, and the refused row
    assert list(target.parent.iterdir()) == [target]


def test_nothing_heavy_is_imported(write):
    code = (
        "import sys; from rlhf_lightning.data.check import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'lightning', 'transformers'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code, write(ROWS)], capture_output=True).returncode == 0


def test_responses_that_begin_with_their_own_prompt_are_advised(write):
    rows = [{"prompt": f"what is {i}?", "chosen": f" what is {i}? it is 4", "rejected": "no"} for i in range(4)]
    assert not any("own prompt" in line for line in check([write(rows)]).files[0].advice)  # of half of them
    rows[0]["rejected"] = "what is 0? no"
    (line,) = [line for line in check([write(rows)]).files[0].advice if "own prompt" in line]
    assert line.startswith("5 of 8 responses begin with their own prompt")


def test_what_a_file_holds_beside_its_rows_is_told_in_the_report(write, recwarn):
    path = write(json.dumps({"version": 1, "data": [{"prompt": "p", "completion": "c"}]}), "rows.json")
    assert "the rows are under key 'data'; not read: version" in check([path]).files[0].advice
    assert not recwarn.list


def test_hints_name_the_commands_own_option(write):
    (line,) = check([write([{"question": "q", "answer": "a"}])]).files[0].refused
    assert "add --columns prompt=question" in line and "data.columns" not in line

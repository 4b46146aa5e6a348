"""JSON files: indented objects, rows at fault inside a list, nulls, and how long reading takes."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest

from rlhf_lightning.data.records import checked_rows, load_records
from rlhf_lightning.errors import InputError

ROWS = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]


def prompts(path):
    return [row.prompt for row in load_records(path).rows]


def test_indented_objects_are_read_under_any_name(write):
    for text in ("\n".join(json.dumps(row, indent=1) for row in ROWS), '{"prompt": "p0",\n "completion": "c"}\n' * 2):
        for name in ("rows.json", "rows.jsonl", "rows.ndjson"):
            assert prompts(write(text, name))[:1] == ["p0"]
            assert len(load_records(write(text, name))) == text.count("prompt")


def test_a_cut_first_line_is_still_one_refused_line(write):
    path = write('{"prompt": "p",\n' + "".join(json.dumps(row) + "\n" for row in ROWS))
    found = list(checked_rows(path, Counter()))
    assert [isinstance(item, InputError) for item in found] == [True, False, False, False]


def test_many_indented_objects_are_read_in_linear_time(write):
    row = '{\n "prompt": "p",\n "completion": "c"\n}\n'
    seconds = []
    for count in (1_000, 8_000):
        path = write(row * count, "rows.json")
        start = time.process_time()
        assert len(load_records(path)) == count
        seconds.append(time.process_time() - start)
    assert seconds[1] < 30 * seconds[0]  # 8 times; it was 64 times


def test_a_list_is_read_on_after_a_row_at_fault(write):
    rows = ['{"prompt": "p0"}', '{"prompt": "a", "prompt": {"b": 1}}', f'{{"prompt": "p", "n": {"1" * 5000}}}']
    path = write(f"[{', '.join([*rows, *rows[:1]])}]", "rows.json")
    found = list(checked_rows(path, Counter()))
    assert [isinstance(item, InputError) for item in found] == [False, True, True, False]
    assert str(found[1]) == f"{path}:2: key 'prompt': stands twice in one object; keep one of them"


def test_null_says_that_the_row_lacks_the_key(write):
    lacking = {"messages": None, "chosen": None, "rejected": None, "label": None, "margin": None, "text": None}
    assert load_records(write([{**lacking, **ROWS[0]}])).rows[0].form.name == "demonstration"
    assert load_records(write(json.dumps([{**lacking, **ROWS[0]}]), "rows.json")).rows[0].columns == {}


TABLE = r"a table by columns; write rows: .*orient='records'"


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": {"0": "a"}, "completion": {"0": "c"}},
        {"prompt": ["a"], "text": ["c"]},
        {"prompt": ["a", "b"]},
        {"prompt": ["a", "b"], "label": [0, 1], "completion": ["c", "d"]},
        {"score": [0.5], "prompt": ["a"], "system": [None]},
        {"prompt": ["a"], "completions": [["b", "c"]], "ratings": [[1, 2]]},
        {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], "label": [True]},
    ],
)
def test_a_table_by_columns_is_told_also_where_its_keys_are_known(write, columns):
    with pytest.raises(InputError, match=TABLE):
        load_records(write(json.dumps(columns), "rows.json"))


ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
ANSWERED = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
        {"prompt": ASKED, "completions": ["a", "b"], "ratings": [1, 2]},
        {"messages": ANSWERED, "tags": ["x", "y"]},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}], "scores": [0.5, 1]},
    ],
)
def test_a_row_of_lists_is_no_table(write, row):
    assert len(load_records(write(json.dumps(row), "rows.json"))) == 1


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ({"prompt": ["a", "b"], "tags": ["x"]}, r"key 'prompt\[0\]'"),
        ({"completions": ["a", "b"], "ratings": [1, 2]}, "prompt"),
        ({"scores": [1, 2], "ranks": [1, 2]}, "completions"),
        ({"messages": []}, "messages"),
        ({}, "accepted forms"),
    ],
)
def test_a_row_at_fault_is_no_table(write, held, problem):
    with pytest.raises(InputError, match=problem) as refused:
        load_records(write(json.dumps(held), "rows.json"))
    assert "table" not in str(refused.value)


@pytest.mark.parametrize("first", [{"prompt": ["a"], "text": ["c"]}, {"data": ROWS}])
def test_what_only_a_file_of_one_object_can_be_is_a_row_among_others(write, first):
    path = write("\n".join(json.dumps(row, indent=1) for row in (first, *ROWS)), "rows.json")
    found = list(checked_rows(path, Counter()))
    assert [isinstance(item, InputError) for item in found] == [True, False, False, False]
    assert "table" not in str(found[0])

"""Files: every fault is refused with its place, and what is harmless is read."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data import files, json_rows, readers
from rlhf_lightning.data.advice import advice, for_training
from rlhf_lightning.data.check import check
from rlhf_lightning.data.records import checked_rows, load_records
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.data.values import Message
from rlhf_lightning.errors import InputError

GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}'


def refusal(path: str) -> str:
    with pytest.raises(InputError) as caught:
        load_records(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "chosen" "a"}', r":2: not valid JSON .*column 26"),
        ('{"prompt": "p", "prompt": "q"}', r":2: key 'prompt': stands twice"),
        ("[1, 2]", r":2: a row must be a JSON object, not a list"),
        ("7", r":2: a row must be a JSON object, not a number"),
        ('{"prompt": "\\ud800"}', r":2: key 'prompt': holds half of a surrogate pair"),
        ("[" * 100_000, r":2: nested too deeply"),
        ('{"prompt": "p", "margin": ' + "1" * 5000 + "}", r":2: .*digits"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = write(f"{GOOD}\n{line}\n{GOOD}\n")
    assert re.match(re.escape(path) + message, refusal(path))


def test_a_line_cut_off_at_the_end_is_named_as_such(write):
    path = write(f"{GOOD}\n{GOOD[:20]}")
    assert refusal(path).startswith(f"{path}:2: the last line is cut off or not valid JSON")


def test_other_encodings_are_named_with_line_and_byte(write):
    path = write(GOOD.encode() + b"\n" + '{"prompt": "caf\xe9"}'.encode("latin-1") + b"\n")
    place = len(GOOD) + 1 + len('{"prompt": "caf')
    assert refusal(path) == f"{path}:2: not UTF-8: byte 0xe9 at byte {place} of the file; save the file as UTF-8"


def test_bom_crlf_and_blank_lines_are_read(write):
    path = write(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n   \n" + GOOD.encode() + b"\r\n")
    rows = load_records(path).rows
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_a_file_without_rows_is_refused(write, content):
    path = write(content)
    assert refusal(path) == f"{path}: contains no rows; give a file with at least one"


def test_gzip_is_read_and_its_damage_is_named(write):
    whole = gzip.compress((GOOD + "\n").encode() * 50)
    assert len(load_records(write(whole, "rows.jsonl.gz"))) == 50
    assert "the gzip data is cut off" in refusal(write(whole[:-12], "cut.jsonl.gz"))
    assert "not valid gzip data" in refusal(write(GOOD, "plain.jsonl.gz"))


def bomb(path: Path, start: bytes, piece: bytes, count: int) -> str:
    with gzip.open(path, "wb", 9) as file:
        file.write(start)
        for _ in range(count):
            file.write(piece)
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_file_that_grows_beyond_what_text_does_is_refused_while_it_is_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    path = bomb(tmp_path / name, b"[" if name == "rows.json.gz" else b"", b" " * 4095 + b"\n", 4096)
    assert refusal(path) == (
        f"{path}: the gzip data holds more than 200 times its size, far more than text does; look what it is, and "
        "decompress it first if it is right"
    )


@pytest.mark.parametrize(("name", "start"), [("rows.jsonl", GOOD + "\n"), ("rows.csv", "prompt,completion\np,c\n")])
def test_a_row_without_an_end_is_refused_at_the_limit(write, monkeypatch, name, start):
    monkeypatch.setattr(json_rows, "ROW", 1 << 16)
    monkeypatch.setattr(readers, "ROW", 1 << 16)
    rest = "x" * (1 << 18)
    assert "more than" in refusal(write(start + rest, name)) and len(load_records(write(start, name))) == 1
    assert len(load_records(write((GOOD + "\n") * 2000))) == 2000  # the file as a whole may be longer


def test_a_list_of_rows_has_a_limit_of_its_own(write, monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 1 << 12)
    path = write(json.dumps([json.loads(GOOD)] * 200), "rows.json")
    told = f"{path}: one JSON value with more than 3.8147e-06 GiB; write one object a line (.jsonl)"
    assert refusal(path) == told


def test_parquet_pages_that_grow_beyond_what_text_does_are_refused(tmp_path, monkeypatch):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    rows = [{"prompt": "p" * 10_000 + str(n), "completion": "c"} for n in range(2000)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(table.from_pylist(rows), path, compression="zstd", compression_level=19)
    assert refusal(str(path)) == (
        f"{path}: holds more than 200 times its size, far more than text does; look what it is, and write it without "
        "compression if it is right"
    )


def test_reading_and_encoding_hold_little_more_than_the_rows(write, kept_tokenizer):
    """The limit per row: what is kept of one, its texts and ids included, and what encoding needs for a moment."""
    texts = [f"the {word} cat sees" for word in ("red", "big", "old", "small")]
    rows = "".join(
        json.dumps({"prompt": f"{texts[n % 4]} {n}", "chosen": f"dog {n} " * 10, "rejected": "no"}) + "\n"
        for n in range(20_000)
    )
    path = write(rows)
    tracemalloc.start()
    try:
        records = load_records(path)
        read, _ = tracemalloc.get_traced_memory()
        examples, _ = Encoder(kept_tokenizer, compared=100).encode(records.rows, "pairs")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(examples) == 20_000
    assert read / 20_000 < 1400 and (held - read) / 20_000 < 800 and (peak - read) / 20_000 < 2400


def test_a_value_that_parquet_repeats_is_counted_as_often_as_it_is_read(tmp_path, monkeypatch):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    path = tmp_path / "rows.parquet"
    parquet.write_table(table.from_pylist([{"prompt": "p" * 10_000, "completion": "c"}] * 2000), path)
    assert "more than 200 times its size" in refusal(str(path))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is no file but a device or a pipe" in refusal(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("content", [b"\xef", b"\xef\xbb", b"prompt,completion\np,\xff\n"])
def test_a_csv_that_is_not_utf8_is_named_with_its_byte(write, content):
    assert re.search(r"not UTF-8: byte 0x(ef at byte 0|ff at byte 20) of the file", refusal(write(content, "rows.csv")))


def test_paths_that_are_no_data_file(write, tmp_path):
    assert refusal(str(tmp_path)).endswith("is a folder; name the data files in it")
    assert "unknown kind of file" in refusal(write("x", "rows.txt"))
    assert "cannot be read (No such file or directory)" in refusal(str(tmp_path / "absent.jsonl"))
    assert "no such file;" in refusal(str(tmp_path / "absent"))
    write("x", "rows.jsonl")
    for name in ("row.jsonl", "rows.jsnl"):
        assert f"(did you mean {tmp_path / 'rows.jsonl'}?)" in refusal(str(tmp_path / name))


def test_csv_rows(write):
    path = write('prompt,chosen,rejected,margin,note\n"a\nb",c,d,1.5,n\np,q,r,,m\n', "rows.csv")
    first, second = load_records(path).rows
    assert (first.prompt, first.responses, first.margin, first.columns) == ("a\nb", ("c", "d"), 1.5, {"note": "n"})
    assert (second.margin, second.where) == (0.0, f"{path}:4")
    ranked = load_records(write('prompt,completions,ranks\np,"[""a"", ""b""]","[2, 1]"\n', "ranks.csv")).rows[0]
    assert ranked.responses == ("b", "a")
    labelled = load_records(write("prompt,completion,label\np,a,True\np,b,false\np,c,\n", "labels.csv")).rows
    assert [row.desirable for row in labelled[:2]] == [True, False] and str(labelled[2].form) == "demonstration"


ASKS, SAYS, WORSE = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
PAIR = ((Message("user", "q"),), ("a", "b"))
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
LIST = "must be a list of messages, got an object; write one with role and content a turn"


def tables(tmp_path, row):
    """The row as CSV, as Parquet of lists and structs, and as Parquet whose cells are JSON text."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([texts.keys(), texts.values()])
    yield str(tmp_path / "cells.csv")
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    for name, cells in (("structs", row), ("texts", texts)):
        parquet.write_table(table.from_pylist([cells]), tmp_path / f"{name}.parquet")
        yield str(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"messages": [ASKS, SAYS]}, PAIR[0], ("a",)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR[0], ("a",)),
        ({"chosen": [ASKS, SAYS], "rejected": [ASKS, WORSE]}, *PAIR),
        ({"prompt": [ASKS], "chosen": [SAYS], "rejected": [WORSE]}, *PAIR),
        ({"prompt": ASKS, "chosen": SAYS, "rejected": WORSE}, *PAIR),
        ({"question": [ASKS], "response_j": [SAYS], "response_k": [WORSE]}, *PAIR),
        ({"prompt": "q", "completions": [[SAYS], [WORSE]], "ranks": [1, 2]}, "q", ("a", "b")),
        ({"input": {"messages": [ASKS]}, "preferred_output": [SAYS], "non_preferred_output": [WORSE]}, *PAIR),
        ({"prompt": "q", "completion": SAYS}, "q", ("a",)),
        ({"instruction": "q", "output": [SAYS]}, "q", ("a",)),
        ({"instruction": "q", "response": [SAYS]}, "q", ("a",)),
        (
            {"messages": [ASKS, {**CALLED, "tool_calls": json.dumps(CALLED["tool_calls"])}]},
            PAIR[0],
            ((Message("assistant", "", json.dumps({"tool_calls": CALLED["tool_calls"]})),),),
        ),
    ],
)
def test_tables_hold_messages_as_objects_and_as_json(tmp_path, row, prompt, responses):
    for path in tables(tmp_path, row):
        (record,) = load_records(path).rows
        assert (record.prompt, record.responses) == (prompt, responses), path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ASKS}, f"key 'messages': {LIST}"),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, f"key 'messages': {LIST}"),
        ({"chosen": SAYS, "rejected": WORSE}, "key 'prompt': is missing; keys found: chosen, rejected"),
        ({"prompt": SAYS, "completion": "a"}, "key 'prompt': the only messages are the assistant's; begin with the"),
        ({"messages": [ASKS, {**CALLED, "tool_calls": "[{"}]}, "key 'messages[1].tool_calls': must be JSON, and is"),
    ],
)
def test_objects_in_tables_that_are_no_messages_are_one_line(tmp_path, row, message):
    for path in tables(tmp_path, row):
        assert re.match(rf"{re.escape(path)}:\d: {re.escape(message)}", refusal(path)), path


def test_other_objects_in_cells_stay_text_and_messages_that_python_wrote_are_told(tmp_path):
    answer = {"role": "manager", "from": "Oslo", "flights": [{"from": "A", "to": "B"}]}
    for value in (answer, answer["flights"], {"text": "a"}, [], {}, 3):
        path = next(tables(tmp_path, {"prompt": "q", "completion": value}))
        (record,) = load_records(path).rows
        assert record.responses == (json.dumps(value),) and not advice([record]) and not for_training([record])
    path = next(tables(tmp_path, {"prompt": "q", "chosen": repr([SAYS]), "rejected": repr([WORSE])}))
    (line,) = for_training(load_records(path).rows)
    assert (
        line.startswith("messages are written as text in 1 of 1 rows, and stay text with their quotes and braces")
        and line in check([path]).files[0].advice
    )
    path = next(tables(tmp_path, {"messages": repr([ASKS, SAYS])}))
    assert refusal(path).startswith(f"{path}:2: key 'messages': the cell must hold a JSON list, got ")
    assert refusal(path).endswith("; write it with json.dumps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\na,b\n", ":2: 2 cells under 3 column names"),
        ("prompt,prompt\na,b\n", ":1: key 'prompt': two columns have this name"),
        ("prompt;completion\na, or so;b\n", ":1: the columns stand between ';'; save the file with commas"),
        ("prompt,chosen,rejected,margin\na,b,c,high\n", ":2: key 'margin': the cell must hold a number, got 'high'"),
        ("prompt,completions,ranks\na,b,c\n", ":2: key 'completions': the cell must hold a JSON list, got 'b'"),
        ("prompt,completion,label\na,b,yes\n", ":2: key 'label': must be true (a response to give) or false, got text"),
        ("prompt,chosen,rejected,margin\na,b,c,nan\n", ":2: key 'margin': must be a finite number"),
        ('prompt\n"a\n', ":2: not valid CSV"),
        (b"prompt\na\n\xff\n", ":3: not UTF-8: byte 0xff at byte 9 of the file"),
    ],
)
def test_bad_csv_is_named(write, text, message):
    path = write(text, "rows.csv")
    assert refusal(path).startswith(path + message)


def test_parquet_rows_and_nulls(write, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "rows.parquet")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0}, {"prompt": "q", "chosen": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert refusal(path).startswith(f"{path}:2: key 'rejected': is missing; keys found: chosen, prompt")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
    assert load_records(path).rows[0].margin == 2.0
    assert "not a readable Parquet file" in refusal(write("nonsense", "bad.parquet"))


def test_optional_packages_are_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(write("x", "rows.parquet")).endswith("needs pyarrow; run: pip install 'rlhf-lightning[parquet]'")
    assert refusal("some/dataset").endswith("run: pip install 'rlhf-lightning[hub]'")


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "absent":
            raise RuntimeError("no such split\nmore")
        return [{"prompt": "p", "completion": "c", "chosen": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (row,) = load_records("owner/name:test").rows
    assert (str(row.form), row.where, asked) == ("demonstration", "owner/name:test:1", [("owner/name", "test")])
    load_records("owner/name")
    assert asked[-1] == ("owner/name", "train")
    assert "cannot be loaded (no such split)" in refusal("owner/name:absent")


def test_every_fault_of_a_file_can_be_collected(write):
    path = write(f"{GOOD}\n{{\n{GOOD}\n[]\n")
    found = [isinstance(row, InputError) for row in checked_rows(path, Counter())]
    assert found == [False, True, False, True]


_TEXTS = st.text(max_size=8) | st.sampled_from(["", " ", "\n\nHuman: a\n\nAssistant: b", "\ud800", "<|im_end|>"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
_KEYS = [
    "prompt",
    "chosen",
    "rejected",
    "completions",
    "ranks",
    "ratings",
    "completion",
    "messages",
    "margin",
    "weight",
]
_ROWS = st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=3), _VALUES, max_size=5)
_QUICK = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _rows_or_refusals(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    dropped: Counter[str] = Counter()
    try:
        for row in checked_rows(str(path), dropped):
            if isinstance(row, InputError):
                assert str(row).startswith(f"{path}:") and "\n" not in str(row)
            elif row is not None:
                assert all(text.strip() for text in row.responses) and 0 <= row.margin < float("inf") > row.weight > 0
    except InputError as error:
        assert str(error).startswith(str(path))


@_QUICK
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"]))
def test_any_bytes_give_rows_or_an_input_error(tmp_path, content, name):
    _rows_or_refusals(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)


@_QUICK
@given(rows=st.lists(_ROWS, max_size=4))
def test_any_json_gives_rows_or_an_input_error(tmp_path, rows):
    _rows_or_refusals(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())


@_QUICK
@given(text=st.lists(st.sampled_from([*_KEYS, ",", "\n", '"', "1", "[", "]", "a", "nan"]), max_size=25).map("".join))
def test_any_csv_gives_rows_or_an_input_error(tmp_path, text):
    _rows_or_refusals(tmp_path / "a.csv", text.encode())

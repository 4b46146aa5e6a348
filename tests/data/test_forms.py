"""Every form of row that people have is read to what is written here by hand; what cannot be read is one line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from rlhf_lightning.data.advice import advice
from rlhf_lightning.data.check import check, main
from rlhf_lightning.data.forms import FORMS
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.values import Message
from rlhf_lightning.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COUNT = 300


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2", "name": "add"}
U, A, B, S = (
    lambda i: Message("user", f"q{i}"),
    lambda i: Message("assistant", f"a{i}"),
    lambda i: Message("assistant", f"b{i}"),
    Message("system", "be kind"),
)
M_CALL, M_RESULT = Message("assistant", "", json.dumps({"tool_calls": [CALL]})), Message("tool", "2", '{"name": "add"}')

# name: (row i, form, prompt, responses, pairs, columns)
CASES = {
    "pair": lambda i: (
        {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "id": i},
        *("pair", f"q{i}", (f"a{i}", f"b{i}"), ((0, 1),), {"id": i}),
    ),
    "transcript": lambda i: (
        {"chosen": f"\n\nHuman: q{i}\n\nAssistant: a", "rejected": f"\n\nHuman: q{i}\n\nAssistant: b"},
        *("transcript", f"\n\nHuman: q{i}\n\nAssistant:", (" a", " b"), ((0, 1),), {}),
    ),
    "chat pair": lambda i: (
        {"chosen": [user(f"q{i}"), assistant("a")], "rejected": [user(f"q{i}"), assistant("b")]},
        *("chat pair", (U(i),), ("a", "b"), ((0, 1),), {}),
    ),
    "chat pair that parts early": lambda i: (
        {
            "chosen": [user(f"q{i}"), assistant(f"a{i}"), user("and?"), assistant("x")],
            "rejected": [user(f"q{i}"), assistant(f"b{i}"), user("and?"), assistant("y")],
        },
        *("chat pair", (U(i),)),
        (
            (A(i), Message("user", "and?"), Message("assistant", "x")),
            (B(i), Message("user", "and?"), Message("assistant", "y")),
        ),
        *(((0, 1),), {}),
    ),
    "chat pair that parts at a question": lambda i: (
        {
            "chosen": [user(f"q{i}"), assistant(f"a{i}"), user("x?"), assistant("x")],
            "rejected": [user(f"q{i}"), assistant(f"a{i}"), user("y?"), assistant("y")],
        },
        *("chat pair", (U(i),)),
        (
            (A(i), Message("user", "x?"), Message("assistant", "x")),
            (A(i), Message("user", "y?"), Message("assistant", "y")),
        ),
        *(((0, 1),), {}),
    ),
    "ultrafeedback": lambda i: (
        {
            **{"prompt": f"q{i}", "score_chosen": 8.0},
            **{"chosen": [user(f"q{i}"), assistant("a")], "rejected": [user(f"q{i}"), assistant("b")]},
        },
        *("chat pair", (U(i),), ("a", "b"), ((0, 1),), {"score_chosen": 8.0}),
    ),
    "answers as messages": lambda i: (
        {"prompt": [SYSTEM, user(f"q{i}")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        *("pair", (S, U(i)), ("a", "b"), ((0, 1),), {}),
    ),
    "sharegpt pair": lambda i: (
        {
            "conversations": [{"from": "human", "value": f"q{i}"}],
            **{"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        },
        *("pair", (U(i),), ("a", "b"), ((0, 1),), {}),
    ),
    "alpaca pair": lambda i: (
        {"instruction": "do", "input": f"q{i}", "chosen": "a", "rejected": "b"},
        *("pair", f"do\nq{i}", ("a", "b"), ((0, 1),), {}),
    ),
    "orca pair": lambda i: (
        {"system": "be kind", "question": f"q{i}", "chosen": "a", "rejected": "b"},
        *("pair", (S, U(i)), ("a", "b"), ((0, 1),), {}),
    ),
    "stack exchange": lambda i: (
        {"qid": i, "question": f"q{i}", "response_j": "a", "response_k": "b"},
        *("question pair", f"q{i}", ("a", "b"), ((0, 1),), {"qid": i}),
    ),
    "openai preference": lambda i: (
        {
            "input": {"messages": [user(f"q{i}")], "tools": [TOOL], "parallel_tool_calls": True},
            **{"preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]},
        },
        *("preference", (U(i),), ("a", "b"), ((0, 1),), {"parallel_tool_calls": True}),
    ),
    "ranking": lambda i: (
        {"prompt": f"q{i}", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]},
        *("ranking", f"q{i}", ("b", "a", "c"), ((0, 1), (0, 2), (1, 2)), {}),
    ),
    "rating": lambda i: (
        {"prompt": f"q{i}", "completions": ["a", "b"], "ratings": [1, 2.5]},
        *("rating", f"q{i}", ("b", "a"), ((0, 1),), {}),
    ),
    "completion": lambda i: (
        {"prompt": f"q{i}", "completion": "a"},
        *("demonstration", f"q{i}", ("a",), (), {}),
    ),
    "completion as messages": lambda i: (
        {"prompt": [user(f"q{i}")], "completion": [CALLED, RESULT, assistant("a")]},
        *("demonstration", (U(i),), ((M_CALL, M_RESULT, Message("assistant", "a")),), (), {}),
    ),
    "begun answer": lambda i: (
        {"prompt": [user(f"q{i}"), assistant("It is")], "completion": " four"},
        *("demonstration", (U(i), Message("assistant", "It is")), (" four",), (), {}),
    ),
    "system beside prompt": lambda i: (
        {"system": "be kind", "prompt": f"q{i}", "completion": "a"},
        *("demonstration", (S, U(i)), ("a",), (), {}),
    ),
    "empty system": lambda i: (
        {"system": "", "prompt": f"q{i}", "completion": "a"},
        *("demonstration", f"q{i}", ("a",), (), {}),
    ),
    "label": lambda i: (
        {"prompt": f"q{i}", "completion": "a", "label": i % 2},
        *("labelled", f"q{i}", ("a",), (), {"label": bool(i % 2)}),
    ),
    "labelled chat": lambda i: (
        {"messages": [user(f"q{i}"), assistant("a")], "label": True},
        *("labelled", (U(i),), ("a",), (), {"label": True}),
    ),
    "chat": lambda i: (
        {"messages": [SYSTEM, user(f"q{i}"), assistant(f"a{i}"), user("and?"), assistant("x")]},
        *("chat", (S, U(i), A(i), Message("user", "and?")), ("x",), (), {}),
    ),
    "chat with tools": lambda i: (
        {"messages": [user(f"q{i}"), CALLED, RESULT, assistant("a")], "tools": json.dumps([TOOL])},
        *("chat", (U(i), M_CALL, M_RESULT), ("a",), (), {}),
    ),
    "chat that ends in a call": lambda i: (
        {"messages": [user(f"q{i}"), CALLED], "tools": [TOOL]},
        *("chat", (U(i),), ((M_CALL,),), (), {}),
    ),
    "parts": lambda i: (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("q", str(i))]}]},
        *("chat", (U(i),), (), (), {}),
    ),
    "ultrachat": lambda i: (
        {"prompt": f"q{i}", "prompt_id": "x", "messages": [user(f"q{i}"), assistant("a")]},
        *("chat", (U(i),), ("a",), (), {"prompt_id": "x"}),
    ),
    "sharegpt": lambda i: (
        {
            "system": "be kind",
            "conversations": [
                {"from": "human", "value": f"q{i}"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a"},
            ],
        },
        *("sharegpt", (S, U(i), M_CALL, Message("tool", "2")), ("a",), (), {}),
    ),
    "alpaca": lambda i: (
        {"instruction": "do", "input": f"q{i}", "output": "a", "text": "all of it"},
        *("alpaca", f"do\nq{i}", ("a",), (), {"text": "all of it"}),
    ),
    "alpaca without input": lambda i: (
        {"instruction": f"q{i}", "input": "", "output": "a"},
        *("alpaca", f"q{i}", ("a",), (), {}),
    ),
    "dolly": lambda i: (
        {"instruction": "do", "context": f"q{i}", "response": "a", "category": "qa"},
        *("dolly", f"do\nq{i}", ("a",), (), {"category": "qa"}),
    ),
    "text": lambda i: ({"text": f"t{i}"}, *("text", "", (f"t{i}",), (), {})),
    "prompt": lambda i: ({"prompt": f"q{i}", "answer": "4"}, *("prompt", f"q{i}", (), (), {"answer": "4"})),
    "verl": lambda i: (
        {"data_source": "gsm8k", "prompt": [user(f"q{i}")], "reward_model": {"style": "rule", "ground_truth": "4"}},
        *("prompt", (U(i),), (), ()),
        {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "4"}},
    ),
}


def write_as(rows, path):
    """The same rows in the format that the name says."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return str(path)
    if ".json" in path.suffixes:
        held = {"data": rows} if "held" in path.name else rows
        text = json.dumps(held, indent=None if "flat" in path.name else 2)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_form_are_read_as_written_here(tmp_path, name):
    cases = [CASES[name](i) for i in range(COUNT)]
    rows = [row for row, *_ in cases]
    for file in ("a.jsonl", "a.jsonl.gz", "flat.json", "a.json", "held.json", "a.json.gz", "a.parquet"):
        records = load_records(write_as(rows, tmp_path / file))
        assert records.dropped == {} and len(records) == COUNT
        for i, (record, (_, form, prompt, responses, pairs, columns)) in enumerate(
            zip(records.rows, cases, strict=True)
        ):
            assert (str(record.form), record.prompt, record.responses, record.pairs, record.columns) == (
                *(form, prompt, responses, pairs, columns),
            ), file
            assert record.where == f"{tmp_path / file}:{i + 1}"
            assert record.tools == (json.dumps([TOOL]) if "tools" in cases[i][0] or name == "openai preference" else "")
    assert len({record.key for record in records.rows}) == COUNT


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        load_records(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_line_says_how_many_rows_have_a_fault_and_what_mends_it(tmp_path):
    rows = [{"promt": f"p{i}", "chosen": "a", "rejected": "b", f"x{i}": 1} for i in range(COUNT)]
    path = write_as(rows, tmp_path / "a.jsonl")
    message = refusal(path)
    assert message.startswith(f"{path}:1: key 'chosen': there is no key 'prompt'")
    assert message.endswith("set data.columns: {prompt: promt}, or rename in the file (300 of 300 rows have this)")
    rows = [{"question": f"p{i}", "answer": "a"} for i in range(4)]
    rows += [{"prompt": i} for i in range(3)] + [{"prompt": "p"}]
    message = refusal(write_as(rows, tmp_path / "b.jsonl"))
    assert "set data.columns: {prompt: question, completion: answer}, or rename in the file (4 of 8 " in message
    assert "; 3 rows are refused for other causes, see data check)" in message
    assert message.endswith("; data check lists the accepted forms") and len(message) < 300 + len(str(tmp_path))


def test_columns_are_mapped(tmp_path):
    path = write_as([{"question": f"q{i}", "answer": f"a{i}", "completion": 3} for i in range(3)], tmp_path / "a.jsonl")
    columns = {"prompt": "question", "completion": "answer", "grade": "completion"}
    rows = load_records(path, columns=columns).rows
    assert [(row.prompt, row.responses, row.columns) for row in rows] == [
        (f"q{i}", (f"a{i}",), {"grade": 3}) for i in range(3)
    ]
    assert "data.columns: no row has a key 'qestion' for 'prompt'; did you mean question? keys" in refusal(
        path, columns={"prompt": "qestion"}
    )
    assert "key 'completion': stands beside 'answer', which data.columns puts in its place" in refusal(
        path, columns={"prompt": "question", "completion": "answer"}
    )
    assert main([path, "--columns", "prompt=question", "completion=answer", "grade=completion"]) == 0
    with pytest.raises(InputError, match=r"--columns prompt: write our name, =, and your name"):
        main([path, "--columns", "prompt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"prompt": "p"}, 3]', ":2: a row must be a JSON object, not a number"),
        (
            "a.json",
            '[{"prompt": "p"},\n {"prompt": "q"]',
            r":2: not valid JSON \(Expecting ',' delimiter, line 2, column 16\); the rows",
        ),
        ("a.json", '[{"prompt": "p"}, {"prompt": "q"', r":2: the file is cut off or not valid JSON"),
        ("a.json", '[{"prompt": "p"} {"prompt": "q"}]', r":1: not valid JSON after this row \(line 1\): a comma or \]"),
        ("a.json", '[{"prompt": "p"}] []', ":1: something follows the end of the list"),
        ("a.json", '{"a": [{}], "b": [{}]}', r": holds several lists of rows \(a, b\)"),
        ("a.json", '{"prompt": {"0": "p"}}', ": a table by columns; write rows: DataFrame.to_json"),
        ("a.json", '{"query": {"0": "p"}}', ": a table by columns; write rows: DataFrame.to_json"),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', ":1: key 'b': stands twice in one object"),
        ("a.jsonl", '{"prompt": "a\\u0000"}', ":1: key 'prompt': holds a NUL character"),
        ("a.csv", "prompt\na\0\n", ":2: key 'prompt': holds a NUL character"),
        ("a.jsonl", '{"prompt": "a", "x": [{"y": "\\u0000"}]}', ":1: key 'x': holds a NUL character"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert re.match(re.escape(str(tmp_path / name)) + message, refusal(str(tmp_path / name)))


def test_parquet_columns_given_twice_and_nul_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    one = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([one, one], names=["prompt", "prompt"]), path)
    assert refusal(path) == f"{path}: key 'prompt': two columns have this name; rename one"
    parquet.write_table(pyarrow.table({"prompt": ["a\0"]}), path)
    assert refusal(path) == f"{path}:1: key 'prompt': holds a NUL character; repair the text"


def test_parquet_structs_lose_the_keys_that_only_other_rows_have(tmp_path):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {name: 1}}} for name in ("a", "b")]
    rows = [{"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    records = load_records(write_as(rows, tmp_path / "a.parquet")).rows
    for record, call in zip(records, calls, strict=True):
        assert json.loads(record.responses[0][0].more) == {"tool_calls": [call]}


def test_texts_without_a_prompt_are_neither_asked_nor_put_into_a_chat(tmp_path):
    path = write_as([{"prompt": "p"}, {"text": "t"}, {"text": "u"}], tmp_path / "a.jsonl")
    message = f"{path}:2: key 'text': is no prompt to answer; give rows with 'prompt' (2 of 3 rows have none)"
    assert refusal(path, prompts=True) == message
    records = load_records(path)
    with pytest.raises(InputError, match="is no prompt to answer"):
        records.check_prompts()
    with pytest.raises(InputError, match=r"a.jsonl:2: key 'text': is learnt as it stands, outside of any chat"):
        _ = records.rows[1].messages


def test_csv_cells_hold_what_they_can(tmp_path):
    path = tmp_path / "a.csv"
    cell = json.dumps([user("q")]).replace('"', '""')
    path.write_text(f'prompt,completion,label,system\n"{cell}",a,1,\nq,[{{,0,be kind\n')
    first, second = load_records(str(path)).rows
    assert (first.prompt, first.desirable) == ((Message("user", "q"),), True)
    assert (second.prompt, second.responses, second.desirable) == ((S, Message("user", "q")), ("[{",), False)


def test_a_prompt_beside_a_conversation_that_lacks_it_is_said(tmp_path):
    rows = [{"prompt": "other", "messages": [user("q"), assistant("a")]}] * 2
    records = load_records(write_as(rows, tmp_path / "a.jsonl"))
    assert records.rows[0].prompt == (Message("user", "q"),) and records.rows[0].columns == {}
    assert records.noted == {"prompt ignored, since the row's own conversation does not have it": 2}
    assert records.dropped == {}


def test_the_check_says_what_looks_wrong(tmp_path, capsys):
    rows = [{"prompt": "same", "completion": f"a{i}", "input": "x", "wieght": 2, "id": i} for i in range(COUNT)]
    path = write_as(rows, tmp_path / "a.jsonl")
    few, unused, misspelt = check([path]).files[0].advice
    assert few.startswith("300 rows have 1 distinct prompt; is the text to answer in another column?")
    assert unused == "column 'input' of 300 rows is not used in training; only rewards get it"
    assert misspelt.startswith("column 'wieght' of 300 rows looks like 'weight'")
    assert main([path]) == 0 and "look at a.jsonl: 300 rows have 1 distinct prompt" in capsys.readouterr().out
    assert advice(load_records(write_as([CASES["label"](i)[0] for i in range(9)], tmp_path / "b.jsonl")).rows) == []


def test_the_documented_examples_are_read_as_the_form_they_stand_for(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([\w ]+?) \| `(\{.*\})` \|", text, flags=re.M)
    assert {name for name, _ in table} >= {str(form) for form in FORMS}
    for name, example in table:
        path = tmp_path / "a.jsonl"
        path.write_text(example.replace("\\|", "|") + "\n")
        (record,) = load_records(str(path)).rows
        assert str(record.form) == name

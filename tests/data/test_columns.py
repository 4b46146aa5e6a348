"""The user's names for keys: given before values are read, misspelt ones of ours refused, options named."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.data.columns import Columns, columns_of
from rlhf_lightning.data.records import load_records
from rlhf_lightning.errors import InputError

ASKED = [{"role": "user", "content": "q"}]


def cells(**values):
    """A CSV file of one row: lists as JSON in their cells."""
    quoted = ['"{}"'.format((v if isinstance(v, str) else json.dumps(v)).replace('"', '""')) for v in values.values()]
    return f"{','.join(values)}\n{','.join(quoted)}\n"


def test_cells_are_read_by_the_names_that_they_are_given(write):
    path = write(cells(q=ASKED, completion="a", good="", delta=2), "rows.csv")
    (row,) = load_records(path, columns={"prompt": "q", "label": "good", "margin": "delta"}).rows
    assert row.prompt[0].content == "q" and not row.form.labelled and row.margin == 2.0

    path = write(cells(dialog=[*ASKED, {"role": "assistant", "content": "a"}]), "chats.csv")
    assert load_records(path, columns={"messages": "dialog"}).rows[0].responses == ("a",)

    path = write(cells(prompt="p", answers=["a", "b"], ratings="no list", scores=[1, 2]), "graded.csv")
    names = {"completions": "answers", "ratings": "scores", "notes": "ratings"}
    (row,) = load_records(path, columns=names).rows
    assert row.responses == ("b", "a") and row.columns == {"notes": "no list"}


@pytest.mark.parametrize("name", ["promt", "completion ", "Chosen", "rating"])
def test_a_misspelt_key_of_ours_is_refused(name):
    with pytest.raises(InputError, match=rf"data.columns: '{name}': no form of rows has this key; did you mean "):
        Columns({name: "foo"})
    Columns({"solution": "foo"})  # a column that rewards are handed


def test_remedies_name_the_option_that_the_command_has(write):
    path = write([{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"set data.columns: {prompt: question, completion: answer}"):
        load_records(path)
    with pytest.raises(InputError, match="add --columns prompt=question completion=answer"):
        load_records(path, columns=Columns({}, "--columns"))


def test_names_may_stand_in_the_last_of_several_calls(write):
    names = Columns(columns_of(["prompt=q", "completion=a"]), "--columns")
    assert len(load_records(write([{"q": "x"}]), columns=names, final=False)) == 1
    assert len(load_records(write([{"q": "x", "a": "y"}], "text.jsonl"), columns=names)) == 1
    with pytest.raises(InputError, match="--columns: no row has a key 'a' for 'completion'"):
        load_records(write([{"q": "x"}]), columns=Columns({"completion": "a"}, "--columns"))

"""The server over loopback: what it answers, whom it refuses, and that it keeps what it has acknowledged."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server
from studies import candidates, write

from rlhf_lightning.preferences.store import Store

A = {"choice": "a", "strength": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    candidates(folder / "c.jsonl", 60)
    gold = [{"prompt": f"g{i}", "chosen": "right", "rejected": "wrong", "explanation": "why"} for i in range(3)]
    write(folder / "g.jsonl", gold)
    (folder / "guide.md").write_text("# Guide\n\n<b>bold</b>\n\n```example\ngood: 'yes'\nbad: 'no'\n```\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = (
        "--gold",
        folder / "g.jsonl",
        "--calibration",
        "1",
        "--guidelines",
        folder / "guide.md",
        "--overlap",
        "2",
    )
    with Server(folder / "c.jsonl", "--store", folder / "s.sqlite", *options) as running:
        yield running


def _judge(server: Server, name: str, client: str) -> dict:
    status, found = server.post(client, name, server.next(name)["item"]["ask"], A)
    assert status == 200, found
    return found


def test_the_study_is_described(server: Server) -> None:
    _, found, _ = server.send("GET", "/api/study")
    assert (found["task"], found["scale"], found["token_needed"]) == ("pairs", [1, 5], False)
    assert "&lt;b&gt;bold&lt;/b&gt;" in found["guidelines"]
    assert '<section class="good"><strong>Good</strong><p dir="auto">yes</p>' in found["guidelines"]


def test_calibration_tells_the_gold_judgement_and_nothing_else_does(server: Server) -> None:
    asked = server.next("cal")
    assert asked["phase"] == "calibration"
    assert set(asked["item"]) == {"ask", "prompt", "answers"}
    status, found = server.post("cal-1", "cal", asked["item"]["ask"], A)
    right = asked["item"]["answers"][0] == "right"
    gold = {"choice": "a" if right else "b", "strength": None}
    assert (status, found["feedback"]) == (200, {"right": right, "gold": gold, "explanation": "why"})
    assert found["next"]["phase"] == "judging"
    for number in range(20):
        found = _judge(server, "cal", f"cal-x{number}")
        assert found["feedback"] is None
        assert set(found["next"]["item"]) == {"ask", "prompt", "answers"}


def test_a_client_id_counts_once_and_belongs_to_one_annotator(server: Server) -> None:
    ask = server.next("once")["item"]["ask"]
    first = server.post("once-1", "once", ask, A)
    again = server.post("once-1", "once", ask, {"choice": "b", "strength": None})
    assert first[0] == again[0] == 200
    assert first[1]["number"] == again[1]["number"]
    elsewhere = server.post("once-1", "once", server.next("once")["item"]["ask"], A)
    assert elsewhere[0] == 409  # an id of one judgement is no answer to another
    status, found = server.post("once-1", "other", server.next("other")["item"]["ask"], A)
    assert (status, found["error"][:9]) == (400, "client_id")
    assert server.post("once-2", "once", ask, A)[0] == 409


def test_undo_shows_the_judgement_again(server: Server) -> None:
    asked = server.next("undo")["item"]
    server.post("undo-1", "undo", asked["ask"], {"choice": "b", "strength": 3}, comment="hm", seconds=1.5)
    for _ in range(2):  # the same id once more changes nothing
        status, found, _ = server.send("POST", "/api/undo", {"client_id": "undo-2", "annotator": "undo"})
        assert status == 200
        assert (found["item"], found["comment"]) == (asked, "hm")
        assert found["value"] == {"choice": "b", "strength": 3}
    status, found, _ = server.send("POST", "/api/undo", {"client_id": "undo-3", "annotator": "undo"})
    assert (status, found["error"]) == (400, "there is no judgement to undo")


def test_one_faulty_row_harms_no_other(server: Server) -> None:
    for change in ({"comment": "\ud83d"}, {"seconds": 10**30}, {"seconds": 10**400}, {"flag": "\udc00"}):
        body = {"client_id": "s-1", "annotator": "sur", "ask": server.next("sur")["item"]["ask"], "value": A}
        status, found, _ = server.send("POST", "/api/judgements", body | change)
        assert status == 400, found


def test_skips_and_flags(server: Server, folder: Path) -> None:
    assert server.post("skip-1", "skip", server.next("skip")["item"]["ask"], skip=True)[0] == 200
    assert server.post("skip-2", "skip", server.next("skip")["item"]["ask"], flag="rude")[0] == 200
    assert server.post("skip-3", "skip", server.next("skip")["item"]["ask"], A, flag="odd", comment=" ")[0] == 200
    with Store(folder / "s.sqlite") as store:
        rows = [(r.value is None, r.flag, r.comment) for r in store.rows() if r.annotator == "skip"]
    assert rows == [(True, None, None), (True, "rude", None), (False, "odd", None)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"value": None}, "value: give a judgement"),
        ({"skip": True}, "skip: must be true or false, and true only"),
        ({"value": {"choice": "c"}}, "choice: must be a, b"),
        ({"ask": "0" * 16}, "ask: no item has this id"),
        ({"annotator": ""}, "annotator: give a name"),
        ({"annotator": "a\nb"}, "annotator: give a name"),
        ({"client_id": None}, "client_id: give each"),
        ({"client_id": "x" * 65}, "client_id: must have at most"),
        ({"comment": 3}, "comment: must be text"),
        ({"comment": "x" * 10_001}, "comment: must have at most 10,000"),
        ({"comment": "\0"}, "comment: holds a NUL"),
        ({"seconds": -1}, "seconds: must be from 0 to"),
        ({"seconds": True}, "seconds: must be a number"),
        ({"more": 1}, "expected an object with client_id"),
    ],
)
def test_a_faulty_judgement_is_refused_and_not_kept(server: Server, change: dict, expected: str) -> None:
    body = {"client_id": "bad-1", "annotator": "bad", "ask": server.next("bad")["item"]["ask"], "value": A}
    status, found, _ = server.send("POST", "/api/judgements", body | change)
    assert (status, found["error"][: len(expected)]) == (400, expected)
    assert not server.next("bad")["undoable"]


def test_other_hosts_origins_and_kinds_are_refused(server: Server) -> None:
    port = server.port
    assert server.send("GET", "/api/lead", host="evil.example")[0] == 403
    assert server.send("GET", "/", host=f"evil.example:{port}")[0] == 403
    assert server.send("GET", "/api/next?annotator=ghost", sec_fetch_site="cross-site")[0] == 403
    assert server.send("GET", "/api/next?annotator=ghost", sec_fetch_site="same-origin")[0] == 200
    assert server.send("GET", "/", sec_fetch_site="cross-site")[0] == 200  # a link to the page may be followed
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.send("GET", "/api/study", host=host)[0] == 200
    body = {"client_id": "o", "annotator": "o"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert server.send("POST", "/api/undo", body, origin=origin)[0] == 403
    assert server.send("POST", "/api/undo", body, content_type="text/plain")[0] == 400
    own = server.send("POST", "/api/undo", body, origin=f"http://127.0.0.1:{port}", host=f"127.0.0.1:{port}")
    assert own[1] == {"error": "there is no judgement to undo"}


def test_faulty_requests_are_one_line(server: Server) -> None:
    cases = [
        ("POST", "/api/judgements", b"{", 400),
        ("POST", "/api/judgements", b"[" * 100_000, 400),
        ("POST", "/api/judgements", b"[1]", 400),
        ("POST", "/api/undo", b'"x"', 400),
        ("POST", "/api/judgements", b" " * (1 << 18) + b"{}", 413),
        ("GET", "/api/next", None, 400),
        ("GET", "/page/../server.py", None, 404),
        ("GET", "/page/%2e%2e%2fserver.py", None, 404),
        ("GET", "/page/none.js", None, 404),
        ("GET", "/api/judgements", None, 405),
        ("GET", "/else", None, 404),
    ]
    for method, path, body, expected in cases:
        status, found, _ = server.send(method, path, body)
        assert status == expected, (path, found)
        assert isinstance(found["error"], str)


def test_every_answer_has_the_headers_of_safety(server: Server) -> None:
    for path in ("/api/study", "/else"):
        headers = server.send("GET", path)[2]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_a_stop_says_what_is_saved_and_a_new_start_goes_on(tmp_path: Path) -> None:
    path = candidates(tmp_path / "c.jsonl", 4)
    command = (path, "--store", tmp_path / "s.sqlite")
    with Server(*command) as first:
        _judge(first, "ann", "k1")
        shown = first.next("ann")
        code, said = first.stop()
    assert code == 130
    assert "1 judgement by 1 annotator in" in said
    assert f"agreement {tmp_path / 's.sqlite'}" in said
    with Server(*command) as second:
        assert any("has 1 judgement by 1 annotator" in line for line in second.lines)
        assert second.next("ann") == shown
        assert second.stop(signal.SIGTERM)[0] == 143


def test_one_server_a_store_and_other_faults_of_the_start(tmp_path: Path) -> None:
    path = candidates(tmp_path / "c.jsonl", 4)
    store = tmp_path / "s.sqlite"
    with Server(path, "--store", store) as running:
        taken = str(running.port)
        cases = {
            ("--store", store): "another annotate serves this store",
            ("--store", tmp_path / "other.sqlite", "--port", taken): "another program uses the port",
        }
        for options, expected in cases.items():
            assert expected in _fails(path, *options)
    candidates(path, 5)
    assert "item 'r4' is not as in" in _fails(path, "--store", store)
    candidates(path, 4)
    assert "was made with --task pairs" in _fails(path, "--store", store, "--task", "rating")
    assert "was made with --order random" in _fails(path, "--store", store, "--order", "file")


def _fails(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "rlhf_lightning", "annotate", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_lead_has_a_token_everywhere(server: Server) -> None:
    token = next(line for line in server.lines if line.startswith("lead")).partition("token=")[2]
    assert server.send("GET", "/api/lead")[0] == 401
    assert server.send("GET", "/api/lead", x_token=token)[0] == 200


def test_behind_another_server_the_public_address_counts(tmp_path: Path) -> None:
    url = "https://study.example.org"
    command = (
        candidates(tmp_path / "c.jsonl", 2),
        "--store",
        tmp_path / "s.sqlite",
        "--url",
        url,
        "--annotators",
        "ada",
    )
    with Server(*command) as server:
        assert server.judge[0].startswith(f"{url}/#annotator=ada&token=")
        token = server.judge[0].partition("token=")[2]
        body = {"client_id": "1", "annotator": "ada"}
        for named in ({"host": "study.example.org"}, {}):  # the server before it may keep the name, or not
            got = server.send("POST", "/api/undo", body, origin=url, x_token=token, **named)
            assert got[:2] == (400, {"error": "there is no judgement to undo"})
        assert server.send("POST", "/api/undo", body, origin="https://evil.example", x_token=token)[0] == 403
        assert server.send("POST", "/api/undo", body, origin=url)[0] == 401


def test_elsewhere_a_token_is_needed(tmp_path: Path) -> None:
    path = candidates(tmp_path / "c.jsonl", 4)
    command = (path, "--store", tmp_path / "s.sqlite", "--host", "0.0.0.0")
    assert "--annotators: others can reach the server" in _fails(*command, "--port", "0")
    with Server(*command, "--annotators", "ada", "grace hopper") as server:
        tokens = [address.partition("token=")[2] for address in server.judge]
        assert server.judge[1].endswith(f"#annotator=grace%20hopper&token={tokens[1]}")
        lead = next(line for line in server.lines if line.startswith("lead")).partition("token=")[2]
        study = server.send("GET", "/api/study")[1]
        assert (study["token_needed"], study["annotators"]) == (True, None)
        get = lambda path, token: server.send("GET", path, x_token=token)[0]  # noqa: E731
        assert get("/api/next?annotator=ada", tokens[0]) == 200
        assert get("/api/next?annotator=ada", tokens[1]) == 401
        assert get("/api/next?annotator=ada", "é") == 401
        assert get("/api/next?annotator=eve", tokens[0]) == 400
        assert get("/api/lead", tokens[0]) == 401
        assert get("/api/lead", lead) == 200
        body = {"client_id": "1", "annotator": "ada"}
        assert server.send("POST", "/api/undo", body, x_token=tokens[1])[0] == 401
        assert server.send("GET", "/api/study", host="evil.example")[0] == 403
        assert (tmp_path / "s.sqlite").stat().st_mode & 0o077 == 0

"""``python -m rlhf_lightning annotate``: serves a local web page on which people judge the answers of a file.

The command imports no torch (but for ``--order uncertain``), so it starts at once.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import itertools
import re
import secrets
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args
from urllib.parse import quote

from rlhf_lightning import __version__
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.outputs import check_output
from rlhf_lightning.preferences.items import Item, check_ids, read_candidates, read_gold
from rlhf_lightning.preferences.store import Part, Store
from rlhf_lightning.preferences.tasks import Task, TaskName, task_of
from rlhf_lightning.text import notice, printable, say

if TYPE_CHECKING:
    from rlhf_lightning.preferences.server import Access
    from rlhf_lightning.preferences.study import Study

_EXAMPLE = """examples:
  python -m rlhf_lightning annotate candidates.jsonl --store labels.sqlite
  python -m rlhf_lightning annotate candidates.jsonl --store labels.sqlite --guidelines guide.md --gold gold.jsonl \\
      --overlap 2 --annotators ada grace
The same command goes on with the same store.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until a signal stops it. Returns 130 or 143; InputError if options or files are at fault."""
    options = _parser().parse_args(argv)
    task = task_of(options.task, options.criteria)
    _check(options)
    from rlhf_lightning.preferences.server import is_loopback, serve  # its packages may be missing: before the work

    if not options.annotators and (options.url or not is_loopback(options.host)):
        raise InputError("--annotators: others can reach the server; name who may judge")
    items = _items(options, task)
    guidelines = None
    if options.guidelines:
        from rlhf_lightning.preferences.guidelines import read_guidelines

        guidelines = read_guidelines(options.guidelines)
    listening = _listening(options.host, options.port)
    with listening, _store(options, task, items) as store:
        study, access = _study(options, store, guidelines)
        _announce(study, access, options, listening.getsockname()[1])
        code = serve(study, access, listening)
        say(notice("saved", f"{_judged(study)} in {printable(str(options.store))}"))
    say(notice("next", f"python -m rlhf_lightning agreement {options.store}"))
    return code


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m rlhf_lightning annotate",
        description="Serves a local web page on which people judge answers. Judgements are kept in one SQLite file.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("candidates", metavar="FILE", help="rows with prompt and completions, as generate writes them")
    add("--store", required=True, metavar="FILE", help="the SQLite file of judgements; it is made if it does not exist")
    add("--task", default="pairs", choices=get_args(TaskName), help="how answers are judged; default pairs")
    add("--criteria", nargs="+", default=[], metavar="NAME", help="what is judged, for pairs beside the whole")
    add("--guidelines", metavar="FILE", help="Markdown that annotators can always open; see docs/preferences.md")
    add("--gold", metavar="FILE", help="rows with the right judgement: for the calibration round, and hidden ones")
    add("--calibration", type=int, metavar="N", help="gold items that come first, with feedback; default 5")
    add("--gold_share", type=float, metavar="P", help="share of hidden gold items; default 0.05")
    add("--repeat_share", type=float, default=0.05, metavar="P", help="share of swapped repeats; default 0.05")
    add("--overlap", type=int, default=1, metavar="N", help="annotators for each item; default 1")
    add("--quota", type=int, metavar="N", help="judgements that each annotator gives; default: as many as there are")
    add("--annotators", nargs="+", metavar="NAME", help="the only names that may judge; default: any")
    add("--order", default="random", choices=("random", "file", "uncertain"), help="what is asked first")
    add("--reward", nargs="+", default=[], metavar="DIR", help="reward models, for --order uncertain")
    add("--host", default="127.0.0.1", help="the address to listen on; default 127.0.0.1, this machine alone")
    add("--url", default="", help="the https address that people use, if another server stands before this one")
    add("--port", type=int, default=8000, help="the port to listen on; 0 takes a free one; default 8000")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, usual in (("calibration", 5), ("gold_share", 0.05)):
        if getattr(options, name) is not None and not options.gold:
            raise InputError(f"--{name}: there are no gold items; give --gold FILE, or leave it out")
        if getattr(options, name) is None:
            setattr(options, name, usual)
    options.url = options.url.rstrip("/")
    if options.url and not re.fullmatch(r"https?://[^/\s#?]+", options.url):
        raise InputError(f"--url {options.url}: must be like https://study.example.org, without a path")
    for name, least in (("overlap", 1), ("quota", 1), ("calibration", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be {least} or more")
    for name in ("gold_share", "repeat_share"):
        if not 0 <= getattr(options, name) <= 0.5:
            raise InputError(f"--{name} {getattr(options, name)}: must be a share from 0 to 0.5")
    if not 0 <= options.port < 1 << 16:
        raise InputError(f"--port {options.port}: must be from 0 to 65535")
    names = options.annotators or []
    for listed, option in ((names, "--annotators"), (options.criteria, "--criteria")):
        twice = next((name for name in listed if listed.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{option}: {twice!r} stands twice; name each once")
        faulty = next((name for name in listed if not name.strip() or not name.isprintable() or len(name) > 64), None)
        if faulty is not None:
            raise InputError(f"{option}: {faulty!r} is no name; give 1 to 64 letters")
    if names and options.overlap > len(names):
        raise InputError(f"--overlap {options.overlap}: there are {len(names)} annotators; name more, or lower it")
    if (options.order == "uncertain") != bool(options.reward):
        raise InputError("--order uncertain and --reward DIR... belong together; give both or none")
    check_output(options.store, "--store", [options.candidates, *filter(None, [options.gold, options.guidelines])])


def _items(options: argparse.Namespace, task: Task) -> list[tuple[Part, Item]]:
    """The items of the files with their parts, in the files' order."""
    found = read_candidates(options.candidates, task)
    say(notice("items", found.summary()))
    gold = read_gold(options.gold, task).items if options.gold else []
    first, hidden = gold[: options.calibration], gold[options.calibration :]
    if gold:
        say(notice("gold", f"{len(first)} for calibration, {len(hidden)} hidden among the others"))
        if not hidden:
            say(notice("gold", "none is left to hide: lower --calibration, or give more gold rows"))
    check_ids([*gold, *found.items])
    return [
        *(("calibration", item) for item in first),
        *(("gold", item) for item in hidden),
        *(("real", item) for item in found.items),
    ]


def _store(options: argparse.Namespace, task: Task, items: list[tuple[Part, Item]]) -> Store:
    """The store, which is made if it does not exist."""
    path = Path(options.store)
    if not path.exists():
        study = {
            "task": task.name,
            "criteria": list(task.criteria),
            "order": options.order,
            "calibration": options.calibration if options.gold else 0,
            "key": secrets.token_hex(32),
            "made": {"version": __version__, "at": datetime.now(UTC).isoformat(timespec="seconds")},
        }
        Store.create(path, study, _ordered(items, options.order, options.reward, study["key"]))
    store = Store(path, writing=True)
    try:
        _check_same(store, options, task, items)
    except InputError:
        store.close()
        raise
    return store


def _check_same(store: Store, options: argparse.Namespace, task: Task, items: list[tuple[Part, Item]]) -> None:
    remedy = "name another --store, or give what the store was made with"
    kept = (store.task.name, store.task.criteria)
    if kept != (task.name, task.criteria):
        was = " ".join([f"--task {kept[0]}", *(["--criteria", *kept[1]] if kept[1] else [])])
        raise InputError(f"{store.path}: was made with {was}; {remedy}")
    if store.study["order"] != options.order:
        raise InputError(f"{store.path}: was made with --order {store.study['order']}; {remedy}")
    calibration = store.study.get("calibration", 0)
    if options.gold and calibration != options.calibration:
        raise InputError(f"{store.path}: was made with --calibration {calibration}; {remedy}")
    there = {item.id: (part, item) for part, item in store.items()}
    given = {item.id: (part, item) for part, item in items}
    changed = next((name for name in [*there, *given] if there.get(name) != given.get(name)), None)
    if changed is not None:
        raise InputError(f"{store.path}: item {printable(changed)!r} is not as in {options.candidates}; {remedy}")


def _ordered(items: list[tuple[Part, Item]], order: str, rewards: Sequence[str], key: str) -> list[tuple[Part, Item]]:
    """The items in the order in which they are asked. A random order still shows each row once before any twice."""
    real = [item for part, item in items if part == "real"]
    if order == "uncertain":
        from rlhf_lightning.preferences.uncertainty import uncertain_order

        real = [real[place] for place in uncertain_order(real, rewards)]
    elif order == "random":
        turns: dict[str, itertools.count[int]] = {}
        turn = {item.id: next(turns.setdefault(item.row, itertools.count())) for item in real}
        drawn = {item.id: hashlib.blake2b(item.id.encode(), key=bytes.fromhex(key)).digest() for item in real}
        real.sort(key=lambda item: (turn[item.id], drawn[item.id]))
    return [*((part, item) for part, item in items if part != "real"), *(("real", item) for item in real)]


def _study(options: argparse.Namespace, store: Store, guidelines: str | None) -> tuple[Study, Access]:
    from rlhf_lightning.preferences.assignment import Rules
    from rlhf_lightning.preferences.server import Access
    from rlhf_lightning.preferences.study import Study

    rules = Rules(options.overlap, options.quota, options.gold_share, options.repeat_share)
    study = Study(store, rules, options.annotators, guidelines)
    return study, Access(options.host, study.key, options.url)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except UnicodeError:
        raise InputError(f"--host {host}: is no name of a machine") from None
    except OSError as error:
        taken = "; another program uses the port: choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror}){taken}") from None
    return listening


def _announce(study: Study, access: Access, options: argparse.Namespace, port: int) -> None:
    """Says where the pages are."""
    from rlhf_lightning.preferences.server import LEAD

    name = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    place = access.url or f"http://{f'[{name}]' if ':' in name else name}:{port}"
    if study.judgements()[0]:
        say(notice("store", f"{printable(str(options.store))} has {_judged(study)}"))
    if access.tokens:
        for annotator in study.annotators or ():
            say(notice("judge", f"{place}/#annotator={quote(annotator)}&token={access.token(annotator)}"))
        say(notice("note", "the addresses open the study to whoever has them; without https others can read along"))
    else:
        say(notice("judge", f"{place}/"))
    say(notice("lead", f"{place}/lead#token={access.token(LEAD)}"))
    say(notice("stop", "Ctrl-C; the same command goes on"))


def _judged(study: Study) -> str:
    judgements, people = study.judgements()
    return f"{judgements:,} judgement{'s'[: judgements != 1]} by {people} annotator{'s'[: people != 1]}"

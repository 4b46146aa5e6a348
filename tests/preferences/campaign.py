"""What a study's server must stand: being killed at any moment, and many annotators at once.

    python tests/preferences/campaign.py kills --kills 200
    python tests/preferences/campaign.py load --annotators 50 --seconds 30

``kills`` lets annotators judge and undo while the server is killed with SIGKILL at random moments and started again. It
fails if an acknowledged judgement is lost, or one counts twice. ``load`` lets each annotator judge once a second. It
fails if an item is over its overlap, or the 95th percentile of the answers' times is 100 ms or more.
"""

from __future__ import annotations

import argparse
import http.client
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import Server
from studies import candidates

from rlhf_lightning.preferences.store import Judgement, Store

_OTHERS: dict[str, Any] = {}  # the answer to a judgement whose item others have judged


@dataclass
class Annotator:
    """A simulated annotator, who sends each judgement until it is acknowledged.

    Args:
        name: the name.
        port: the server's.
        seed: of what is judged.
        pause: seconds between two judgements.
        undos: share of undos.
    """

    name: str
    port: int
    seed: int
    pause: float
    undos: float = 0.0
    kept: dict[str, str | None] = field(default_factory=dict)  # client id -> choice as shown, None for an undo
    times: list[float] = field(default_factory=list)  # seconds of each request
    errors: list[str] = field(default_factory=list)

    def work(self, stop: threading.Event) -> None:
        """Judges until there is nothing left or it is stopped."""
        draw = random.Random(self.seed)
        time.sleep(draw.random() * self.pause)
        while not stop.is_set():
            begun = time.monotonic()
            found = self._send(stop, "GET", f"/api/next?annotator={self.name}")
            if found is None or found["item"] is None:
                return
            client = f"{self.name}-{len(self.times)}"
            body: dict[str, Any] = {"client_id": client, "annotator": self.name}
            choice = None
            if found["undoable"] and draw.random() < self.undos:
                answer = self._send(stop, "POST", "/api/undo", body)
            else:
                choice = draw.choice(("a", "b", "tie", "both_bad"))
                body |= {"ask": found["item"]["ask"], "value": {"choice": choice, "strength": None}, "seconds": 1.0}
                answer = self._send(stop, "POST", "/api/judgements", body)
            if answer is None:
                return
            if answer is not _OTHERS:
                self.kept[client] = choice
            stop.wait(max(0.0, self.pause - (time.monotonic() - begun)))

    def _send(self, stop: threading.Event, method: str, path: str, body: Any = None) -> Any:
        """One request, repeated until it is answered; None if the work is over before that."""
        while not stop.is_set():
            begun = time.perf_counter()
            try:
                status, found, _ = Server.request(self.port, method, path, body)
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)
                continue
            self.times.append(time.perf_counter() - begun)
            if status == 200:
                return found
            if status == 409 and "in the meantime" in found["error"]:
                return _OTHERS  # a new start does not know whose screen an item is on
            if status != 503:
                self.errors.append(f"{self.name}: {status} {found}")
                return None
        return None


def kills(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Kills a server so many times while three annotators work. Returns what went wrong."""
    command = _study(folder, rows=max(20, 2 * count), answers=8, overlap=2)  # more items than can be judged
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    draw, stop = random.Random(seed), threading.Event()
    people = [Annotator(f"a{n}", port, seed + n, pause=0.003, undos=0.1) for n in range(3)]
    threads = [threading.Thread(target=one.work, args=(stop,)) for one in people]
    for thread in threads:
        thread.start()
    for number in range(count):
        with Server(*command, port=port) as server:
            time.sleep(draw.random() * 0.4)
            server.process.kill()
        if (number + 1) % 20 == 0:
            print(f"{number + 1} kills, {sum(len(one.kept) for one in people):,} judgements and undos", flush=True)
    with Server(*command, port=port):  # those who wait are answered
        time.sleep(1.0)
        stop.set()
        for thread in threads:
            thread.join()
    return [error for one in people for error in one.errors] + _faults(folder / "s.sqlite", people)


def load(folder: Path, annotators: int, seconds: float, overlap: int = 3) -> tuple[list[str], list[float]]:
    """Lets so many annotators judge once a second. Returns what went wrong, and the seconds of all requests."""
    with Server(*_study(folder, rows=500, answers=4, overlap=overlap)) as server:
        stop = threading.Event()
        people = [Annotator(f"a{n}", server.port, n, pause=1.0) for n in range(annotators)]
        threads = [threading.Thread(target=one.work, args=(stop,)) for one in people]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join()
    faults = [error for one in people for error in one.errors] + _faults(folder / "s.sqlite", people, overlap)
    return faults, [value for one in people for value in one.times]


def _study(folder: Path, rows: int, answers: int, overlap: int) -> list[str]:
    path = candidates(folder / "c.jsonl", rows, answers)
    return [str(path), "--store", str(folder / "s.sqlite"), "--overlap", str(overlap), "--repeat_share", "0.1"]


def _faults(path: Path, people: list[Annotator], overlap: int = 2) -> list[str]:
    """What the store has that it may not have, and what it lacks."""
    with Store(path) as store:
        rows, standing = store.rows(), store.judgements()
    found = Counter(row.client_id for row in rows)
    by_client = {row.client_id: row for row in rows}
    faults = [f"{client} {times} times" for client, times in found.items() if times > 1]
    for one in people:
        for client, choice in one.kept.items():
            row = by_client.get(client)
            if row is None:
                faults.append(f"{client} lost")
            elif _shown(row) != choice:
                faults.append(f"{client} kept as {_shown(row)}, sent as {choice}")
    acknowledged = {client for one in people for client in one.kept}
    # One judgement of each annotator may have been written and not acknowledged when the work ended.
    if len(set(found) - acknowledged) > len(people):
        faults.append(f"{len(set(found) - acknowledged)} rows that nobody was told of")
    given = Counter((row.annotator, row.item, row.part) for row in standing)
    faults += [f"{place} judged {times} times" for place, times in given.items() if times > 1]
    items = Counter(row.item for row in standing if row.part == "real")
    return faults + [f"{name} has {times} judgements" for name, times in items.items() if times > overlap]


def _shown(row: Judgement) -> str | None:
    if row.value is None:
        return None
    sides = {("first", "second")[place]: side for place, side in zip(row.shown, "ab", strict=True)}
    return sides.get(row.value["choice"], row.value["choice"])


def main() -> int:
    """Runs one of the two. Returns 1 if something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "load"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "kills":
            faults = kills(Path(folder), options.kills, options.seed)
        else:
            faults, times = load(Path(folder), options.annotators, options.seconds)
            p95 = statistics.quantiles(times, n=20)[-1]
            middle, most = statistics.median(times), max(times)
            print(f"{len(times):,} requests: median {middle:.4f} s, p95 {p95:.4f} s, at most {most:.4f} s")
            faults += [f"p95 is {p95:.3f} s"] if p95 >= 0.1 else []
        with Store(Path(folder) / "s.sqlite") as store:
            print(f"{len(store.rows()):,} rows; {len(faults)} faults")
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m rlhf_lightning generate``: lets policies answer prompts, so that people can compare the answers.

A row of the result is ``{"id", "prompt", "completions": [...], "policies": [...]}``, with the other columns of its
prompt. Equal answers stand once, with the names of all policies that gave them. The order of the answers tells nothing.

What is answered so far stands in a file beside the result, which the same command goes on with after any stop.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rlhf_lightning.data.named import named
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.text import notice, plain_warnings, printable, say

if TYPE_CHECKING:
    from rlhf_lightning.data.rows import Record
    from rlhf_lightning.rollout.prompting import Settings

_EVERY = 10.0  # seconds between two lines of progress
_OWN = ("id", "prompt", "completions", "policies")
_EXAMPLE = """example:
  python -m rlhf_lightning generate --policies sft=runs/sft/model ppo=runs/ppo/model --prompts prompts.jsonl \\
      --count 2 --out candidates.jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 when the file is written; raises an InputError if options or files are at fault."""
    options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    policies = dict(named(options.policies, "--policies"))
    _check(options, policies)

    # Imported here, so that --help and wrong options answer at once.
    from rlhf_lightning.data.columns import Columns, columns_of
    from rlhf_lightning.data.records import load_records
    from rlhf_lightning.rollout.prompting import Settings, chosen_device

    plain_warnings()
    records = load_records(options.prompts, prompts=True, columns=Columns(columns_of(options.columns), "--columns"))
    ids = _ids(records.rows)
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        chat=options.chat,
        device=chosen_device(options.device),
        trust_remote_code=options.trust_remote_code,
    )
    asked = {"policies": policies, "prompts": records.fingerprint(), "count": options.count, **settings.__dict__}
    with _Answered(Path(options.out), asked) as answered:
        for place, (name, folder) in enumerate(policies.items()):
            _answer(name, folder, place, records.rows, options.count, settings, answered)
        rows = [
            _row(record, ids[number], number, answered.of(number, policies), options.seed)
            for number, record in enumerate(records.rows)
        ]
        kept = [row for row in rows if len(row["completions"]) > 1]
        if not kept:
            answered.discard()
            raise InputError(
                f"--out {options.out}: no prompt got two different answers; raise --temperature or --count"
            )
        write_whole(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        answered.discard()
    alone, dropped = len(rows) - len(kept), sum(records.dropped.values())
    left = [f"{alone:,} prompts whose answers are all equal"] * bool(alone)
    left += [f"{count:,} rows: {reason}" for reason, count in sorted(records.dropped.items())] if dropped else []
    say(notice("rows", f"{len(kept):,} of {records.read:,} prompts; left out: {', '.join(left) or 'none'}"))
    say(notice("next", f"python -m rlhf_lightning annotate {options.out} --store labels.sqlite"))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m rlhf_lightning generate",
        description="Lets policies answer prompts, so that people can compare the answers. After a stop, the same "
        "command goes on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policies", nargs="+", required=True, metavar="NAME=DIR", help="model folders; the name may be left out")
    add("--prompts", nargs="+", required=True, metavar="FILE", help="rows with prompts")
    add("--out", required=True, metavar="FILE", help="the rows with answers, one JSON object a line")
    add("--count", type=int, default=4, help="answers of each policy to each prompt (default: %(default)s)")
    add("--columns", nargs="+", default=[], metavar="OURS=YOURS", help="our name of a key, and yours: prompt=question")
    add("--max_new_tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="prompts at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the answers and of their order (default: %(default)s)")
    add("--chat", action="store_true", help="put plain prompts through the chat template too")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    return parser


def _check(options: argparse.Namespace, policies: dict[str, str]) -> None:
    for name in ("count", "max_new_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise InputError(f"--temperature {options.temperature}: must be 0 or more")
    joined = next((name for name in policies if "+" in name or not name.isprintable()), None)
    if joined is not None:
        raise InputError(f"--policies {joined}=: a name has no '+', which joins the names of equal answers")
    if options.count * len(policies) < 2:
        raise InputError("--count 1: one answer of one policy leaves nothing to compare; raise it")
    if options.temperature == 0 and options.count > 1:
        raise InputError(f"--count {options.count}: at --temperature 0 a policy's answers are all the same; give 1")
    check_output(options.out, "--out", [*options.prompts, *policies.values()])
    if Path(options.out).exists():
        raise InputError(f"--out {options.out}: exists already; name another file, or delete it")


def _ids(records: Sequence[Record]) -> list[str]:
    """Each row's own id, else its number in the files, from 1."""
    found: dict[str, str] = {}
    for record in records:
        name = str(record.columns.get("id", record.number + 1))
        if name in found:
            raise InputError(f"{record.where}: key 'id': is {name!r} as in {found[name]}; each row needs its own")
        found[name] = record.where
    return list(found)


@dataclass(frozen=True)
class _Part:
    """What one policy answered to the prompts of one batch: its ``number``-th answers."""

    policy: str
    number: int
    batch: int
    answers: dict[int, str]  # by the prompt's place


class _Answered:
    """The answers so far. Each batch is on the disk before the next one is asked.

    Args:
        out: the result's file, beside which they stand.
        asked: everything that the answers depend on.

    Raises:
        InputError: they are those of another command.
    """

    def __init__(self, out: Path, asked: dict[str, Any]) -> None:
        self.path = out.with_name(f".{out.name}.part")
        self._head = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._parts: dict[tuple[str, int, int], _Part] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self.path.exists():
            whole = self._read()
        self._file: IO[bytes] = self.path.open("r+b" if whole else "wb")
        self._file.truncate(whole)  # a line that a kill has cut off
        self._file.seek(whole)
        if not whole:
            self._append({"asked": self._head})

    def _read(self) -> int:
        """Reads the whole lines, and returns how many bytes they take."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
            except ValueError:
                raise InputError(f"{self.path}:{number + 1}: is damaged; delete the file, and begin anew") from None
            if number == 0 and found.get("asked") != self._head:
                raise InputError(
                    f"{self.path}: holds answers of another command (other options, prompts or policies); repeat that "
                    "command, or delete the file"
                )
            if number:
                answers = {int(place): text for place, text in found.pop("answers").items()}
                self._add(_Part(**found, answers=answers))
            whole += len(line)
        return whole

    def _add(self, part: _Part) -> None:
        self._parts[part.policy, part.number, part.batch] = part

    def has(self, policy: str, number: int, batch: int) -> bool:
        """Whether this batch is answered."""
        return (policy, number, batch) in self._parts

    def keep(self, part: _Part) -> None:
        """Writes the answers to a batch."""
        self._append(dict(part.__dict__))
        self._add(part)

    def of(self, place: int, policies: Sequence[str] | dict[str, str]) -> list[tuple[str, str]]:
        """(policy, answer) of the prompt at this place, in the order of policies and numbers."""
        order = {name: at for at, name in enumerate(policies)}
        parts = [part for part in self._parts.values() if place in part.answers]
        parts.sort(key=lambda part: (order[part.policy], part.number))
        return [(part.policy, part.answers[place]) for part in parts]

    def _append(self, content: dict[str, Any]) -> None:
        self._file.write((json.dumps(content) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> _Answered:
        return self

    def discard(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if not self._parts:
            self.discard()


def _answer(
    name: str,
    folder: str,
    place: int,
    records: Sequence[Record],
    count: int,
    settings: Settings,
    answered: _Answered,
) -> None:
    """Lets one policy answer every prompt ``count`` times, but for what is answered already."""
    from rlhf_lightning.data.tokenization import Encoder
    from rlhf_lightning.models.loading import eos_ids, load_tokenizer
    from rlhf_lightning.randomness import CANDIDATES, uniform
    from rlhf_lightning.rollout.engine import Sampling
    from rlhf_lightning.rollout.fitting import fitting_engine
    from rlhf_lightning.rollout.prompting import load_policy, prompt_batches

    tokenizer = load_tokenizer(folder, settings.trust_remote_code)
    policy = load_policy(folder, tokenizer, settings)
    encoder = Encoder(tokenizer, chat=settings.chat, columns="--columns")
    batches = prompt_batches(encoder, records, policy, folder, settings)
    engine, total, before = fitting_engine(policy), count * len(records), 0
    seed = int(uniform(settings.seed, CANDIDATES, place) * 2**52)
    begun = said = time.monotonic()
    done = tokens = 0
    for number in range(count):
        for at, batch in enumerate(batches):
            done += len(batch)
            if answered.has(name, number, at):
                before += len(batch)
                continue
            sampling = Sampling(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                eos_ids=eos_ids(policy.model, tokenizer),
                seed=seed,
                iteration=number,
            )
            rollout = engine.rollout(policy, batch, tokenizer, sampling)
            tokens += int(rollout.response_lengths.sum())
            texts = [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in rollout.responses]
            answered.keep(_Part(name, number, at, dict(zip(batch.rows.tolist(), texts, strict=True))))
            if time.monotonic() - said >= _EVERY:
                said = time.monotonic()
                say(f"{printable(name)}: {done:,} of {total:,} answers, {tokens / (said - begun):,.0f} tokens/s")
    rate = tokens / max(time.monotonic() - begun, 1e-9)
    kept = f" ({before:,} of them before)" if before else ""
    say(f"{printable(name)}: {total:,} answers{kept}, {rate:,.0f} tokens/s")


def _row(record: Record, name: str, place: int, answers: Sequence[tuple[str, str]], seed: int) -> dict[str, Any]:
    """A row of the result: the different answers in an order that tells nothing."""
    from rlhf_lightning.randomness import CANDIDATES, permutation

    by_text: dict[str, list[str]] = {}
    for policy, text in answers:
        by_text.setdefault(text, []).append(policy)
    texts = list(by_text)
    order = permutation(len(texts), seed, CANDIDATES, place, -1).tolist()
    prompt = record.prompt if isinstance(record.prompt, str) else [message.turn() for message in record.prompt]
    return {
        "id": name,
        "prompt": prompt,
        "completions": [texts[i] for i in order],
        "policies": ["+".join(dict.fromkeys(by_text[texts[i]])) for i in order],
        **{key: value for key, value in record.columns.items() if key not in _OWN},
    }

"""``python -m rlhf_lightning generate``: several answers of one or more policies to each prompt, to be compared.

A command that is stopped goes on where it was, and writes what it would have written. The output is complete as soon as
it exists. The order of a row's answers does not tell which policy gave them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import CommandParser, InputError, out_of_memory
from rlhf_lightning.models.policy_arguments import (
    add_answer_arguments,
    check_numbers,
    check_temperature,
    chosen_device,
    named,
)
from rlhf_lightning.outputs import check_output
from rlhf_lightning.text import plain_warnings, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.rows import Record
    from rlhf_lightning.preferences.partial import PartialAnswers

_EXAMPLE = """example:
  python -m rlhf_lightning generate --policies sft=runs/sft/model ppo=runs/ppo/model --prompts prompts.jsonl \\
      --count 4 --out candidates.jsonl
"""
_EVERY_SECONDS = 10.0  # between two lines of progress
_OURS = ("id", "prompt", "completions", "policies")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 when the file is written; raises an InputError if options or files are at fault."""
    options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    policies = dict(named(options.policies, "--policies"))
    _check(options, policies)
    out = Path(options.out)
    partial_path = out.with_name(f"{out.name}.partial")
    for path in (out, partial_path):
        check_output(path, "--out", [*options.prompts, *policies.values()])
    for folder in policies.values():
        if Path(folder).expanduser().is_dir() and out.resolve().is_relative_to(Path(folder).expanduser().resolve()):
            raise InputError(f"--out {out}: stands in the model folder {folder}; name a file elsewhere")
    if out.exists():
        raise InputError(f"--out {out}: this file exists already; delete it, or name another one")

    # Imported here, so that --help and wrong options answer at once.
    from rlhf_lightning.data.asked import asked
    from rlhf_lightning.data.columns import Columns, columns_of
    from rlhf_lightning.models.passes import explain
    from rlhf_lightning.preferences.candidates import write_rows
    from rlhf_lightning.preferences.partial import PartialAnswers

    plain_warnings()
    check_temperature(options.temperature)
    device = chosen_device(options.device)
    prompts = asked(options.prompts, options.max_prompts, Columns(columns_of(options.columns), "--columns"))
    say(f"prompts: {prompts.summary()}")
    known, columns = _ids(prompts.prompts), _columns(prompts.prompts)
    tokenizers = _tokenizers(policies, prompts.prompts, options)
    with PartialAnswers(partial_path, _fingerprint(options, policies, prompts.prompts)) as partial:
        try:
            for name, folder in policies.items():
                _answer(name, folder, tokenizers[name], prompts.prompts, partial, options, device)
        except KeyboardInterrupt:
            say(f"stopped: {len(partial.texts):,} answers are in {partial_path}; the same command goes on there")
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                sizes = f"lower --batch_size ({options.batch_size}), and the same command goes on"
                explain(error, "generate", [sizes])
            raise
        rows, single = [], 0
        for record, id, others in zip(prompts.prompts, known, columns, strict=True):
            row = _row(record, id, others, partial, list(policies), options)
            single += len(row["completions"]) == 1
            rows.append(row)
        if single == len(rows):
            partial_path.unlink()  # answers of no use
            raise InputError(
                "--policies: all answers to each prompt are the same, so there is nothing to compare; raise "
                "--temperature or --count"
            )
        write_rows(out, (row for row in rows if len(row["completions"]) > 1))
        partial_path.unlink()
    left_out = f"all answers the same {single:,}" if single else "none"
    say(f"{out}: {len(rows) - single:,} of {len(rows):,} prompts; left out: {left_out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m rlhf_lightning generate",
        description="Sample several answers to each prompt, to be ranked by people or by a judge. Stopped at any "
        "moment, the same command goes on where it was.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_answer_arguments(add)
    add("--count", type=int, default=4, help="answers of each policy to each prompt (default: %(default)s)")
    add("--top_k", type=int, default=0, help="sample from the k most probable tokens; 0 from all (default: 0)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the smallest set of tokens of this probability; 1 from all (default: 1)",
    )
    add("--out", required=True, metavar="FILE", help="the file to write; until it is whole, FILE.partial grows")
    return parser


def _check(options: argparse.Namespace, policies: dict[str, str]) -> None:
    check_numbers(options)
    for name in policies:
        if "+" in name:
            raise InputError(
                f"--policies {name}: a plus joins names in the output; give a name without it, as NAME=DIR"
            )
    if options.count < 1:
        raise InputError(f"--count {options.count}: expected a number of at least 1")
    if options.count == 1 and len(policies) == 1:
        raise InputError("--count 1: one answer of one policy leaves nothing to compare; give 2 or more")
    if options.count > 1 and options.temperature == 0:
        raise InputError(
            f"--count {options.count}: at --temperature 0 all answers of a policy to a prompt are the same; raise one, "
            "or give --count 1 with several policies"
        )
    if options.top_k < 0:
        raise InputError(f"--top_k {options.top_k}: expected a number of at least 0")
    if not 0 < options.top_p <= 1:
        raise InputError(f"--top_p {options.top_p}: expected a probability above 0, and at most 1")


def _ids(prompts: Sequence[Record]) -> list[str]:
    """Each row's own id as a text, or its number in all files together.

    Raises:
        InputError: two rows have one id.
    """
    places: dict[str, str] = {}
    for record in prompts:
        own = record.columns.get("id")
        id = str(record.number if own is None else own)
        if id in places:
            raise InputError(f"{record.where}: key 'id': {id!r} is also that of {places[id]}; give each row its own")
        places[id] = record.where
    return list(places)


def _columns(prompts: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows' other columns as they are written, and lines about what is written under another name or not at all."""
    from rlhf_lightning.data.kept_columns import free_names, prompt_value, written

    names = free_names({name for record in prompts for name in record.columns} - {"id"}, _OURS)
    for old, new in names.items():
        if old != new:
            say(f"column {old!r} is written as {new!r}")
    left_out: set[str] = set()
    rows = []
    for record in prompts:
        others = {name: value for name, value in record.columns.items() if name != "id"}
        tools = {"tools": record.raw["tools"]} if record.tools and "tools" in record.raw else {}
        rows.append(written(record, others | tools, names | {"tools": "tools"}))
        prompt = prompt_value(record)
        own = {name for name, value in record.raw.items() if value is not None and value != prompt}
        left_out |= own - {"id", "prompt", "tools", *others}
    if left_out:
        say(f"prompts: keys that are not written to the output: {', '.join(sorted(left_out))}")
    return rows


def _tokenizers(
    policies: dict[str, str], prompts: Sequence[Record], options: argparse.Namespace
) -> dict[str, PreTrainedTokenizerBase]:
    """All tokenizers first, so that a mistyped folder is found before the first policy has answered for an hour."""
    from rlhf_lightning.models.loading import load_tokenizer
    from rlhf_lightning.models.template import template_text

    tokenizers = {name: load_tokenizer(folder, options.trust_remote_code) for name, folder in policies.items()}
    chats = [record.where for record in prompts if not isinstance(record.prompt, str)]
    if options.chat or chats:
        what = "--chat:" if options.chat else f"{chats[0]}: the prompt is a chat, and"
        for name, tokenizer in tokenizers.items():
            if template_text(tokenizer) is None:
                remedy = "leave the option out" if options.chat else "give prompts that are texts"
                raise InputError(f"{what} the tokenizer of {policies[name]} has no chat template; {remedy}")
    return tokenizers


def _fingerprint(options: argparse.Namespace, policies: dict[str, str], prompts: Sequence[Record]) -> dict[str, Any]:
    """Everything that answers depend on. Models count by the names, sizes and times of their files."""
    asked = hashlib.blake2b(digest_size=8)
    for record in prompts:
        asked.update(repr((record.number, record.identity)).encode("utf-8", "backslashreplace"))
    values = {name: getattr(options, name) for name in ("count", "temperature", "top_k", "top_p", "max_new_tokens")}
    for name, folder in policies.items():
        files = hashlib.blake2b(digest_size=8)
        place = Path(folder).expanduser()
        for path in sorted(place.iterdir() if place.is_dir() else []):
            files.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode("utf-8", "replace"))
        values[f"policy {name}"] = f"{folder} ({files.hexdigest()})"
    return values | {"seed": options.seed, "chat": options.chat, "prompts": asked.hexdigest()}


def _answer(
    name: str,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Record],
    partial: PartialAnswers,
    options: argparse.Namespace,
    device: str,
) -> None:
    """Adds the answers of one policy that are not there yet."""
    from rlhf_lightning.data.tokenization import Encoder
    from rlhf_lightning.models.loading import eos_ids
    from rlhf_lightning.preferences.candidates import candidate_rollouts, candidate_seed, readable
    from rlhf_lightning.preferences.partial import Place
    from rlhf_lightning.rollout.answering import (
        batches_by_length,
        check_long_prompts,
        check_longest_prompt,
        load_policy,
    )
    from rlhf_lightning.rollout.engine import Sampling

    total = options.count * len(prompts)
    found = sum(place.policy == name for place in partial.texts)
    if found:
        say(f"{name}: {found:,} of {total:,} answers are in {partial.path}")
    if found == total:
        return
    policy = load_policy(folder, tokenizer, device, options.trust_remote_code)
    encoder = Encoder(tokenizer, chat=options.chat, columns="--columns")
    check_long_prompts(encoder, prompts, policy, folder, options.max_new_tokens)
    batches = batches_by_length(encoder, prompts, "prompts", options.batch_size, every_row=True)
    by_number = {record.number: record for record in prompts}
    check_longest_prompt(batches, by_number, policy, folder, options.max_new_tokens)
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_ids=eos_ids(policy.model, tokenizer),
        seed=candidate_seed(options.seed, name),
    )

    def known(number: int, batch: Any) -> bool:
        return all(Place(name, number, row) in partial.texts for row in batch.rows.tolist())

    progress = _Progress(name, found, total)
    for number, batch, rollout in candidate_rollouts(
        policy, batches, tokenizer, options.count, sampling, known, progress.step
    ):
        places = [Place(name, number, row) for row in batch.rows.tolist()]
        new = sum(place not in partial.texts for place in places)
        partial.add(dict(zip(places, map(readable, rollout.responses), strict=True)))
        progress.batch(new, int(rollout.response_lengths.sum()))
    progress.end()


class _Progress:
    """Lines that say how many answers there are, and how many tokens are sampled in a second."""

    def __init__(self, name: str, done: int, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._done, self._total = name, done, total
        self._clock = clock
        self._began = self._told = clock()
        self._tokens = 0

    def step(self, token: int, most: int) -> None:
        """Hears of the tokens within a batch."""
        if self._clock() - self._told >= _EVERY_SECONDS:
            self._tell(f"; token {token:,} of up to {most:,}")

    def batch(self, answers: int, tokens: int) -> None:
        """Hears of a finished batch."""
        self._done += answers
        self._tokens += tokens
        if self._done < self._total and self._clock() - self._told >= _EVERY_SECONDS:
            self._tell()

    def end(self) -> None:
        """Tells the sum."""
        self._tell(f" in {self._clock() - self._began:.1f} s")

    def _tell(self, more: str = "") -> None:
        self._told = self._clock()
        speed = f", {self._tokens / max(self._told - self._began, 1e-9):,.0f} tokens/s" if self._tokens else ""
        say(f"{self._name}: {self._done:,} of {self._total:,} answers{speed}{more}")


def _row(
    record: Record,
    id: str,
    others: dict[str, Any],
    partial: PartialAnswers,
    policies: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A row of the output. Equal answers, apart from white space around them, are one answer of several policies."""
    from rlhf_lightning.data.kept_columns import prompt_value
    from rlhf_lightning.preferences.partial import Place
    from rlhf_lightning.randomness import CANDIDATE_ORDER, permutation

    texts: dict[str, str] = {}
    givers: dict[str, list[str]] = {}
    for policy in policies:
        for number in range(options.count):
            text = partial.texts[Place(policy, number, record.number)]
            key = text.strip()
            texts.setdefault(key, text)
            if policy not in givers.setdefault(key, []):
                givers[key].append(policy)
    keys = list(texts)
    order = permutation(len(keys), options.seed, CANDIDATE_ORDER, record.number).tolist()
    return {
        "id": id,
        "prompt": prompt_value(record),
        "completions": [texts[keys[place]] for place in order],
        "policies": ["+".join(givers[keys[place]]) for place in order],
        **others,
    }

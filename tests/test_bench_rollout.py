"""The benchmark of rollouts runs at a tiny size, and its limit is what a hand counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from ppo_harness import prompts
from tiny_models import make_config
from transformers import LlamaForCausalLM

from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import Sampling

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_rollout  # noqa: E402
from training import sizes  # noqa: E402


def test_the_bytes_of_decoding_by_hand() -> None:
    model = LlamaForCausalLM(make_config(tie_word_embeddings=True)).to(torch.bfloat16)
    batch = prompts(3)  # 2, 3 and 4 tokens
    # 5 tokens are 4 steps after the prefill. An entry is 2 layers of 2 heads of 8 numbers, for keys and for values.
    entries = (2 + 3 + 4) * 4 + 3 * (1 + 2 + 3 + 4)
    assert bench_rollout.bytes_of_decoding(Policy(model), batch, 5) == 2 * (4 * model.num_parameters() + 64 * entries)


def test_the_peer_gets_the_prompts_padded_on_the_left() -> None:
    model = LlamaForCausalLM(make_config())
    batch, peer = prompts(3), bench_rollout.Batched()
    peer.model = model
    found = peer.rollout(Policy(model), batch, None, Sampling(max_new_tokens=5, eos_ids=[]))
    assert found.shape == (3, 4 + 5)
    for row, length, tokens in zip(found, batch.lengths.tolist(), batch.tokens, strict=True):
        assert row[4 - length : 4].tolist() == tokens[:length].tolist()


def test_every_engine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    target = tmp_path / "rollout.json"
    options = ["--size", "tiny", "--repeats", "2", "--threads", "1", "--json", str(target)]
    engines = ["plain steps", "native", "transformers", "generate"]
    monkeypatch.setattr(sys, "argv", ["bench_rollout.py", *options, "--engines", *engines])
    bench_rollout.main()
    found = json.loads(target.read_text(encoding="utf-8"))
    assert [found[key] for key in ("size", "rows", "new_tokens", "weights")] == ["tiny", 8, 5, "float32"]
    assert {name: len(times) for name, times in found["seconds"].items()} == dict.fromkeys(engines, 2)
    assert min(min(times) for times in found["seconds"].values()) > found["limit_seconds"] > 0
    page = target.with_suffix(".md").read_text(encoding="utf-8")
    assert found["about"]["commit"] in page and capsys.readouterr().out.strip() in page

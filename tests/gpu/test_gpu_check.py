"""`make gpu-check` itself: what it refuses, and that a stage which fails or hangs stops no other. Needs no GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu import check, small_kernels

SANITIZERS = ["sanitizer-memcheck", "sanitizer-racecheck"]


def facts(**changes: Any) -> dict[str, Any]:
    """A machine on which everything is in place, but for the changes."""
    whole = {
        "missing": [], "torch": "2.11.0+cu130", "cuda": "13.0", "cuda_home": "/cuda", "ninja": True,
        "gpus": ["NVIDIA X"], "capabilities": [[9, 0]], "gigabytes": [80.0],
    }  # fmt: skip
    return {**whole, **changes}


@pytest.fixture(autouse=True)
def toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "nvcc_release", lambda home: {"/cuda": "13.0", "/old": "12.8"}.get(home))
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: f"/bin/{name}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"missing": ["torch", "pytest"]}, "has no torch, pytest: choose another one with PYTHON="),
        ({"gpus": [], "capabilities": []}, "no GPU: torch.cuda.is_available() is False"),
        ({"torch": "2.13.0+cpu", "cuda": None, "cuda_home": None}, "torch 2.13.0+cpu is a CPU build"),
        ({"cuda_home": None}, "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit"),
        ({"cuda_home": "/empty"}, "no nvcc in /empty/bin: set CUDA_HOME"),
        ({"cuda_home": "/old"}, "nvcc is of CUDA 12.8, torch is built with 13.0: set CUDA_HOME"),
    ],
    ids=["all well", "packages", "GPU", "CPU build", "nvcc", "CUDA_HOME", "another CUDA"],
)
def test_what_is_missing_is_said_with_its_remedy(changes, words):
    found = check.obstacles(facts(**changes))
    assert found == [] if words is None else len(found) == 1 and words in found[0]


def test_this_python_is_told_apart():
    found = check.probe()
    assert found["missing"] == [] and found["torch"].startswith("2.")


def test_the_build_is_for_the_gpus_at_hand(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stages = {s.name: s for s in check.plan(facts(capabilities=[[9, 0], [8, 0], [9, 0]]))}
    assert stages["build"].variables["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert list(stages) == ["build", "info", "tests", "kernels", *SANITIZERS, "benchmark"]
    scripts = [word for s in stages.values() for word in s.command if word.endswith(".py")]
    assert scripts and all((check.ROOT / script).exists() for script in scripts)


def test_without_compute_sanitizer_its_stages_say_so(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: None)
    left_out = [s for s in check.plan(facts()) if s.result]
    assert [s.name for s in left_out] == SANITIZERS
    assert {s.result for s in left_out} == {"NOT RUN: compute-sanitizer is not installed here"}


def test_every_stage_has_its_least_time_whatever_the_earlier_ones_take(monkeypatch, tmp_path):
    """Each stage is run to the end of the time that it is given."""
    stages, now, given = check.plan(facts()), [1000.0], {}

    def take_all(stage: check.Stage, until: float) -> None:
        given[stage.name] = min(stage.limit, until - now[0])
        now[0] += given[stage.name]

    monkeypatch.setattr(check.Stage, "run", take_all)
    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(check, "probe", facts)
    monkeypatch.setattr(check, "plan", lambda _: stages)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "FOLDER", tmp_path / "logs")
    check.main()
    assert all(given[stage.name] >= stage.least > 0 for stage in stages), given
    assert given["benchmark"] >= 120 and now[0] <= 1000 + check.TOTAL


def test_the_sanitizers_cannot_watch_pytorch_instead():
    stages = {s.name: s for s in check.plan(facts())}
    for name in ("kernels", *SANITIZERS):
        assert stages[name].variables["RLHF_LIGHTNING_OPS"] == "native"
    assert stages["kernels"].command[-1] == "--names"
    assert stages["sanitizer-racecheck"].command[-2:] == ["float32", "bfloat16"]


def test_kernels_that_are_not_ours_are_a_failure(monkeypatch):
    call = small_kernels.make_gae(1, 1)
    monkeypatch.setattr(small_kernels, "calls", lambda dtype: [call])
    monkeypatch.setattr(small_kernels, "launched", lambda function: ["at::native::add"])
    assert small_kernels.main(["--device", "cpu", "--names", "float32"]) == 1
    monkeypatch.setattr(small_kernels, "launched", lambda function: ["void rlhf_lightning::gae_kernel<float>"])
    assert small_kernels.main(["--device", "cpu", "--names", "float32"]) == 0


def run(monkeypatch, tmp_path: Path, codes: list[str], limit: float = 20.0) -> int:
    stages = [check.Stage(f"stage{n}", [sys.executable, "-c", code], limit) for n, code in enumerate(codes)]
    monkeypatch.setattr(check, "probe", facts)
    monkeypatch.setattr(check, "plan", lambda _: stages)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "FOLDER", tmp_path / "logs")
    return check.main()


def test_a_failing_stage_stops_no_other_and_the_exit_code_tells(monkeypatch, tmp_path, capfd):
    assert (
        run(
            monkeypatch, tmp_path, ["print('first'); raise SystemExit(3)", "print('========= ERROR SUMMARY: 0 errors')"]
        )
        == 1
    )
    summary = capfd.readouterr().out.partition("=== gpu-check, ")[2].splitlines()
    assert "NVIDIA X (80 GB, 9.0)" in summary[0] and "torch 2.11.0+cu130, nvcc 13.0" in summary[0]
    assert summary[1].split() == ["stage0", summary[1].split()[1], "s", "FAILED:", "exit", "code", "3", "first"]
    assert summary[2].split()[2:] == ["s", "ok", "0", "errors"]
    assert (tmp_path / "logs" / "stage0.log").read_text() == "first\n"
    assert run(monkeypatch, tmp_path, ["print('fine')"]) == 0


def test_the_benchmark_may_lack_its_peers_and_nothing_else(monkeypatch, tmp_path):
    fine = {s.name: s.fine for s in check.plan(facts())}
    assert fine.pop("benchmark") == (0, 3) and set(fine.values()) == {(0,)}
    stages = [
        check.Stage("ends", [sys.executable, "-c", f"raise SystemExit({code})"], 20, fine=(0, 3)) for code in (3, 1)
    ]
    monkeypatch.setattr(check, "FOLDER", tmp_path)
    for stage in stages:
        stage.run(time.monotonic() + 20)
    assert [stage.result for stage in stages] == ["ok", "FAILED: exit code 1"]


def test_a_stage_that_hangs_is_stopped_with_its_children(monkeypatch, tmp_path, capfd):
    began = time.monotonic()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert run(monkeypatch, tmp_path, [child, "print('later')"], limit=1.5) == 1
    out = capfd.readouterr().out
    assert "FAILED: stopped after 2 s" in out and "later" in out
    assert time.monotonic() - began < 20


def test_what_escapes_a_stage_does_not_hold_up_the_rest(monkeypatch, tmp_path, capfd):
    """A process of another session is not stopped, and keeps the stage's output open."""
    began = time.monotonic()
    child = "[sys.executable, '-c', 'import time; time.sleep(30)'], start_new_session=True"
    assert run(monkeypatch, tmp_path, [f"import subprocess, sys; subprocess.Popen({child}); print('gone')"]) == 0
    assert "gone" in capfd.readouterr().out
    assert time.monotonic() - began < 20

"""docs/metrics.md has every metric that the code logs, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from methods import METHODS, method
from ppo_harness import fit, make_module, prompts
from small_data import SmallData, train
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks.event_log import LAYOUT
from rlhf_lightning.modules import (
    DPOModule,
    KTOModule,
    ORPOModule,
    RewardModelModule,
    SFTModule,
    SimPOModule,
)

ROOT = Path(__file__).resolve().parent.parent.parent
GROUPS = "train|val|policy|critic|objective|rollout|reward|rewards|logps|importance|time"
PAGE = set(re.findall(rf"`((?:{GROUPS})/\w+)`", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")))
# Sums that other metrics are made of, and are logged as something else.
INNER = {"policy/ratio_squared"}


def logged() -> set[str]:
    names = set()
    for folder in ("modules", "training"):
        for path in (ROOT / "rlhf_lightning" / folder).glob("*.py"):
            names |= set(re.findall(rf'"((?:{GROUPS})/[a-z_0-9]+)"', path.read_text(encoding="utf-8")))
    return names - INNER


def test_the_page_has_every_metric() -> None:
    assert logged() - PAGE == set()


def test_the_page_has_no_metric_that_nobody_logs() -> None:
    written_out = ("policy", "critic", "objective", "rollout", "importance")
    made = {name for name in PAGE if name.partition("/")[0] in written_out}
    by_network = {f"{network}/{what}" for network in ("policy", "critic") for what in ("grad_norm", "router_loss")}
    assert made - logged() - by_network == set()


def test_the_page_of_charts_shows_metrics_that_there_are() -> None:
    shown = {name.strip("^$") for charts in LAYOUT.values() for _, names in charts.values() for name in names}
    assert shown <= PAGE


@pytest.mark.parametrize("cls", [SFTModule, RewardModelModule, DPOModule, KTOModule, ORPOModule, SimPOModule])
def test_what_a_fit_logs_is_on_the_page(cls: type, tiny_policy_dir: Path) -> None:
    module = cls(str(tiny_policy_dir))
    train(module, SmallData(tiny_policy_dir, [[0, 1, 2]], held_out=True))
    logged_names = {name for name in module.trainer.callback_metrics if name != "val/loss_epoch"}
    assert logged_names >= {"train/loss", "val/loss"}
    assert logged_names - PAGE == set()


@pytest.mark.parametrize("name", METHODS)
def test_what_an_iteration_logs_is_on_the_page(name: str, tiny_policy_dir: Path) -> None:
    cls, options = method(name)
    module = make_module(tiny_policy_dir, method=cls, **options)
    trainer = fit(module, [prompts(8)])
    trainer.validate(module, DataLoader([prompts(4)], batch_size=None), verbose=False)
    assert {name for line in module.logged for name in line} - PAGE == set()

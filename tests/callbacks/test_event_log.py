"""TensorBoard's events have the page of charts that a run opens on."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from rlhf_lightning.callbacks.event_log import EventLogger


def test_the_charts_are_laid_out_once_with_the_first_metrics(tmp_path: Path) -> None:
    logger = EventLogger(save_dir=str(tmp_path), name="", version="")
    for step in (0, 1):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.save()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    titles = [chart.title for chart in layout.category[0].chart]
    assert [title.partition(" ")[0].strip(",") for title in titles] == ["reward", "KL", "length", "losses"]
    assert "^val/scores$" in layout.category[0].chart[0].multiline.tag

"""Turns signals into a wish to stop, which all processes agree on at a moment where a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.collectives import flag_raised, largest, lower_flag, raise_flag
from rlhf_lightning.text import say

# SIGUSR1 is a cluster's warning that the time is up; Windows has none.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_FLAG = "rlhf_lightning/stop"
_PATIENCE = 1.0  # seconds between two looks for another process's flag
_REQUEUE = 1000  # stands for the signal that wants a requeue, and wins over all others


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 set a flag; a second Ctrl-C stops at once.

    Lightning's own handlers talk to the other processes from within the signal, which hangs where they are in a
    collective of the training. So the flag is only asked for at `agreed`.
    """

    def __init__(self) -> None:
        self._came = 0  # the number of the signal that came to this process; only the handler writes it
        self._agreed = 0  # of the one that all processes know of
        self._looked = 0.0  # when this process last looked for a flag of another
        self._old: dict[int, Any] = {}
        self._interrupted = False  # whether Ctrl-C came
        self._requeueing = 0  # the signal that asks SLURM to start the job again, 0 for none

    def take(self, trainer: Trainer) -> None:
        """Handles the signals from now on. Lightning sets its own handlers at a run's start, so call this after it."""
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
            return
        cluster = trainer._accelerator_connector.cluster_environment
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue and cluster.requeue_signal:
            self._requeueing = int(cluster.requeue_signal)
        for number in {*_SIGNALS, *filter(None, [self._requeueing])}:
            if signal.getsignal(number) != self._handle:
                self._old.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Restores the handlers from before, where nobody has set others meanwhile."""
        for number, handler in self._old.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._old = {}

    def came(self) -> bool:
        """Whether a signal came to this process, or to another that has asked before; no process waits for another."""
        if self._came:
            raise_flag(_FLAG)
            return True
        if time.monotonic() < self._looked + _PATIENCE:
            return False
        self._looked = time.monotonic()
        return flag_raised(_FLAG)

    def agreed(self) -> bool:
        """Whether a signal came to any process; every process must ask."""
        self._agreed = largest(max(self._came, self._agreed))
        if self._agreed:
            lower_flag(_FLAG)  # a later fit of these processes begins without it
        return self._agreed > 0

    @property
    def requeues(self) -> bool:
        """Whether the agreed signal wants the job to be started again."""
        return self._agreed >= _REQUEUE

    def stop(self) -> NoReturn:
        """Ends the run as the agreed signal asked for."""
        if self._agreed == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        # SLURM may send SIGTERM soon after; the wish for a requeue stays.
        self._came = _REQUEUE if number == self._requeueing or self._came == _REQUEUE else number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        with suppress(RuntimeError):  # Python refuses to print where the signal came in the middle of a print
            say(f"\n{signal.Signals(number).name}: stopping as soon as a checkpoint can be written{again}")

"""Turns signals into a wish to stop, which all processes agree on at a moment where a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lightning.collectives import largest
from rlhf_lightning.text import say

# SIGUSR1 is a cluster's warning that the time is up; Windows has none.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 set a flag; a second Ctrl-C stops at once.

    Lightning's own handler talks to the other processes from within the signal, which hangs where they are in a
    collective of the training. So the flag is only asked for at `agreed`.
    """

    def __init__(self) -> None:
        self._number = 0  # of the signal that came; 0 for none
        self._old: dict[int, Any] = {}

    def take(self) -> None:
        """Handles the signals from now on. Lightning sets its own handlers at a run's start, so call this after it."""
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != self._handle:
                self._old.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Restores the handlers from before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    @property
    def came(self) -> bool:
        """Whether a signal came to this process."""
        return self._number > 0

    def agreed(self) -> bool:
        """Whether a signal came to any process; every process must ask."""
        self._number = largest(self._number)
        return self.came

    def stop(self) -> NoReturn:
        """Ends the run as the signal asked for."""
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self._number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        say(f"\n{signal.Signals(number).name}: stopping as soon as a checkpoint can be written{again}")

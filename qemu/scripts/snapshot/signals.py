# SPDX-License-Identifier: GPL-2.0-or-later

"""
Signals that ask the program to end.  They only leave a note, which is looked
at where it is safe to stop: an exception out of a signal handler could leave
the QMP connection, which is needed to undo things, in pieces.
"""

import signal
from types import FrameType
from typing import Optional

from .errors import Interrupted


class Signals:
    """SIGINT, SIGTERM and SIGHUP, from the making of this object on."""

    def __init__(self) -> None:
        self._caught: Optional[int] = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Who ignores a signal (nohup) wants it ignored
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: Optional[FrameType]) -> None:
        self._caught = number

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self._caught is not None:
            name = signal.Signals(self._caught).name
            # Once is enough: undoing must not be interrupted in turn
            self._caught = None
            raise Interrupted(f'interrupted by {name}')

# SPDX-License-Identifier: GPL-2.0-or-later

"""
How a command can end.  Each kind of end has its exit code, so that a script
can tell "nothing has happened" from "look after it".
"""

from typing import List


class SnapshotError(Exception):
    """The command has failed, and all it had changed is undone."""
    exit_code = 1
    status = 'failed'


class Refused(SnapshotError):
    """The command has not begun: nothing was changed."""
    exit_code = 2
    status = 'refused'


class NotUndone(SnapshotError):
    """The command has failed, and something is left to be done by hand."""
    exit_code = 3
    status = 'incomplete'

    def __init__(self, message: str, todo: List[str]):
        super().__init__(message)
        self.todo = todo


class Interrupted(SnapshotError):
    """A signal has ended the command, and all it had changed is undone."""
    exit_code = 130
    status = 'interrupted'

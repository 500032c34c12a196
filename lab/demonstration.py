"""What the demos have in common: a guest with a busy database, and words.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, List, Tuple

from . import env, guest
from .vm import VM
from .workload import SelfCheck

RAM_MB, FILLED_MB, DISK_MB = 1024, 512, 512
COMMIT = r'^db commit (\d+)$'
# At the moment of a snapshot, a row's line may be cut in two.
LINES_CUT = 1


def say(text: str = '') -> None:
    print(text, flush=True)


def step(text: str) -> None:
    say(f'  {time.strftime("%H:%M:%S")}  {text}')


def introduce() -> None:
    say(f'A guest with {RAM_MB} MiB of RAM, 2 vCPUs and a database (SQLite '
        'on ext4 on a\nqcow2 disk) that commits row after row. '
        f'{FILLED_MB} MiB of its RAM check themselves.\n')


def start_work(vm: VM) -> None:
    """Have the guest, which has booted, begin."""
    vm.console.run('mkdir /db && mount -t ext4 /dev/vda /db && '
                   'database run /db/rows.db &')
    vm.console.wait(COMMIT, 0, 60)
    SelfCheck(write_mb=FILLED_MB, static_mb=0, pause_us=5000).start(vm)


def last_commit(vm: VM) -> int:
    """The last row that the guest has reported as durable."""
    for line in reversed(vm.console.lines()):
        found = re.match(COMMIT, line)
        if found:
            return int(found.group(1))
    raise RuntimeError('the database has reported no commit')


def first_commit(vm: VM) -> int:
    """The first row that a restored guest reports."""
    return int(vm.console.wait(COMMIT, 0, 60).group(1))


def check_database(vm: VM) -> int:
    """Have SQLite and our program check it all; returns its rows."""
    mark = vm.console.mark()
    vm.console.run('database check /db/rows.db &')
    return int(vm.console.wait(r'^db rows=(\d+) ok', mark, 60).group(1))


def check_restored(vm: VM) -> None:
    """The database and the RAM of a guest that was restored."""
    rows = check_database(vm)
    SelfCheck(proof=1).prove(vm)
    step(f'restored: database whole ({rows} rows by now), and its RAM '
         'checks itself clean')


class Speedometer:
    """Commits a second in named stretches of time."""

    def __init__(self, vm: VM):
        self._vm = vm
        self._at: List[Tuple[float, int]] = []
        self.mark()

    def mark(self) -> None:
        self._at.append((time.monotonic(), last_commit(self._vm)))

    def rates(self) -> List[float]:
        return [(n2 - n1) / (t2 - t1) for (t1, n1), (t2, n2)
                in zip(self._at, self._at[1:])]

    def say_rates(self) -> None:
        before, during, after = self.rates()
        say(f'  commits per second: {before:.0f} before, {during:.0f} during, '
            f'{after:.0f} after the snapshot')


def run(demonstrate: Callable[[], None], name: str, files: Path) -> None:
    """Run a demo whose scratch files are in a folder; does not return."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit('terminated'))
    guest.build()
    env.LOGS.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    try:
        demonstrate()
    except Exception as problem:  # pylint: disable=broad-except
        say(f'\nThe demo failed: {problem or type(problem).__name__}\n'
            f'See {name}* in {env.LOGS}')
        sys.exit(1)
    finally:
        shutil.rmtree(files, ignore_errors=True)
    sys.exit(0)

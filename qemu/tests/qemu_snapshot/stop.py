# SPDX-License-Identifier: GPL-2.0-or-later

"""
qemu-snapshot, with a signal at a given place: stop.py PLACE ARGUMENTS...

PLACE is "FUNCTION COUNT before|after SIGNAL", such as "QemuImg.commit 2 after
kill": when the function is called for the second time.
"""

import os
import shutil
import signal
import sys

import case  # noqa: F401  (makes the package importable)
from snapshot import blockjobs, cli, create, disks, images, merging, undo


PLACES = {'blockjobs': blockjobs, 'Create': create.Create, 'disks': disks,
          'Merging': merging.Merging, 'os': os, 'QemuImg': images.QemuImg,
          'shutil': shutil, 'Undo': undo.Undo}


def stop_at(place):
    """Have the signal sent there."""
    function, count, when, name = place.split()
    owner, _, function = function.partition('.')
    original = getattr(PLACES[owner], function)
    calls = []

    def send():
        os.kill(os.getpid(), getattr(signal, 'SIG' + name.upper()))

    def stopping(*arguments, **named):
        calls.append(arguments)
        if len(calls) == int(count) and when == 'before':
            send()
        result = original(*arguments, **named)
        if len(calls) == int(count) and when == 'after':
            send()
        return result

    setattr(PLACES[owner], function, stopping)


if __name__ == '__main__':
    stop_at(sys.argv[1])
    sys.exit(cli.main(sys.argv[2:]))

# SPDX-License-Identifier: GPL-2.0-or-later
"""apt with sources, lists and a state of its own; the machine's stay as they
are."""

import contextlib
import os
import pwd
import re
import subprocess
import tempfile
from pathlib import Path

from apt_source import private_entry
from tree import BUILD


class PrivateApt:
    """folder: scratch space that goes away with it."""

    def __init__(self, folder, entries):
        self.folder = folder
        for name in ('parts', 'state/lists/partial',
                     'cache/archives/partial'):
            (folder / name).mkdir(parents=True)
        # Nothing is installed, as far as this one knows.
        (folder / 'state/status').touch()
        (folder / 'parts/private.sources').write_text('\n'.join(entries))
        user = pwd.getpwuid(os.geteuid()).pw_name
        self._options = ['-q']
        for option in (f'Dir::Etc::sourceparts={folder}/parts',
                       'Dir::Etc::sourcelist=/dev/null',
                       f'Dir::State={folder}/state',
                       f'Dir::State::status={folder}/state/status',
                       f'Dir::Cache={folder}/cache',
                       'Debug::NoLocking=1', 'Acquire::Languages=none',
                       # _apt may not enter the build directory.
                       f'APT::Sandbox::User={user}'):
            self._options += ['-o', option]

    def run(self, tool, *args, **kwargs):
        """Run apt-get or apt-cache; its output is captured."""
        return subprocess.run([tool, *self._options, *args], text=True,
                              capture_output=True, **kwargs)

    def update(self):
        """Whether all of the sources can be read; if not, apt says why."""
        return subprocess.run(
            ['apt-get', *self._options, 'update', '--error-on=any'],
            stdout=subprocess.DEVNULL).returncode == 0

    def versions(self, package, *args):
        """The versions that there are of a package; @args are apt-cache's."""
        shown = self.run('apt-cache', *args, package)
        return re.findall(r'^Version: (.*)$', shown.stdout, re.M)


@contextlib.contextmanager
def private_apt(*sources):
    """Each of @sources is a suite and deb or deb-src.

    Gives None if apt is not configured with a Debian mirror for the running
    release.
    """
    entries = [private_entry(*source) for source in sources]
    if None in entries:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix='apt-', dir=BUILD) as folder:
        yield PrivateApt(Path(folder), entries)

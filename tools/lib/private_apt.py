#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""apt with sources, lists and a state of its own; the machine's stay as they
are.

Run as a program, `private_apt.py SUITE PACKAGE FOLDER` downloads a package.
"""

import contextlib
import os
import pwd
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from apt_source import private_entry
from tree import BUILD, Refused, main


class PrivateApt:
    """folder: scratch space that goes away with it."""

    def __init__(self, folder, entries, suites):
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
        # If any of the sources cannot be read, apt says why.
        if subprocess.run(
                ['apt-get', *self._options, 'update', '--error-on=any'],
                stdout=subprocess.DEVNULL).returncode:
            raise Refused(f'{suites} cannot be read from the configured '
                          'mirror')

    def run(self, tool, *args, **kwargs):
        """Run apt-get or apt-cache; its output is captured."""
        return subprocess.run([tool, *self._options, *args], text=True,
                              capture_output=True, **kwargs)

    def version(self, project, suite, package, *args):
        """That of a package of the project's release; @args are
        apt-cache's."""
        shown = self.run('apt-cache', *args, package)
        versions = re.findall(r'^Version: (.*)$', shown.stdout, re.M)
        for version in versions:
            if re.match(rf'(\d+:)?{re.escape(project.release)}\.\d', version):
                return version
        raise Refused(f'{suite} has {project.title} '
                      f'{", ".join(versions) or "not"}, not {project.release}')


@contextlib.contextmanager
def private_apt(*sources):
    """Each of @sources is a suite and deb or deb-src, to be read now."""
    BUILD.mkdir(parents=True, exist_ok=True)
    entries = [private_entry(*source) for source in sources]
    if None in entries:
        raise Refused('apt is not configured with a Debian mirror for the '
                      'running release')
    with tempfile.TemporaryDirectory(prefix='apt-', dir=BUILD) as folder:
        yield PrivateApt(Path(folder), entries,
                         ', '.join(suite for suite, _ in sources))


def download():
    suite, package, folder = sys.argv[1:]
    with private_apt((suite, 'deb')) as apt:
        done = apt.run('apt-get', 'download', package, cwd=folder)
        if done.returncode:
            raise Refused(done.stderr.strip())


if __name__ == '__main__':
    main(download)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The projects that a series is kept for, and their prepared trees: each a
repository of its own below the build directory.

`base` is the pristine source as one commit; the branch `series` has one
commit for each patch and cover letter on top of it.  What the tools made last
is recorded in .git/series-state, so that a developer's own work there is
noticed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get('BUILD') or ROOT / 'build').resolve()

UTF8 = 'utf-8', 'surrogateescape'

# Whatever the user configured (diff algorithm, autocrlf, hooks, signing)
# must not change a single byte of what these tools make.
ENV = {
    'GIT_CONFIG_GLOBAL': '/dev/null',
    'GIT_CONFIG_NOSYSTEM': '1',
    'GIT_TERMINAL_PROMPT': '0',
    'LC_ALL': 'C.UTF-8',
    'TZ': 'UTC',
}
IDENTITY = {
    'GIT_AUTHOR_NAME': 'base',
    'GIT_AUTHOR_EMAIL': 'base@localhost',
    'GIT_AUTHOR_DATE': '2025-04-23T00:00:00Z',
    'GIT_COMMITTER_NAME': 'base',
    'GIT_COMMITTER_EMAIL': 'base@localhost',
    'GIT_COMMITTER_DATE': '2025-04-23T00:00:00Z',
}


class Refused(Exception):
    """What was asked for cannot be done; the text says why and what helps."""


@dataclass(frozen=True)
class Project:
    """What there is a series for."""
    name: str           # of Debian's source package, and of folders here
    title: str          # in messages
    trees: Path         # where src is, and obj, stock, series
    prepare: str        # the command that makes src
    make: str           # the one that builds it, too
    variable: str       # names another source than Debian's
    release: str
    suites: tuple       # of Debian, that have that release
    orig: bool          # without Debian's patches
    needs: tuple        # files of its source
    version_in: tuple   # such a file, and what the version is in it
    subprojects: tuple  # that a build without network needs
    get_subprojects: str

    @property
    def src(self):
        return self.trees / 'src'

    def version(self, source):
        """That of a source tree; None if it is not one of this project."""
        file, pattern = self.version_in
        found = re.search(pattern, (source / file).read_text())
        return found and found[1]


QEMU = Project(
    name='qemu', title='QEMU', trees=BUILD,
    prepare='make prepare', make='make', variable='QEMU_SRC',
    release='10.0', suites=('trixie', 'bookworm-backports'), orig=False,
    needs=('VERSION', 'configure', 'meson.build'),
    version_in=('VERSION', r'(\S+)'),
    subprojects=('keycodemapdb', 'berkeley-softfloat-3',
                 'berkeley-testfloat-3'),
    get_subprojects='meson subprojects download {}')
LIBVIRT = Project(
    name='libvirt', title='libvirt', trees=BUILD / 'libvirt',
    prepare='tools/prepare libvirt', make='make libvirt',
    variable='LIBVIRT_SRC',
    release='11.3', suites=('trixie',), orig=True,
    needs=('meson.build',),
    version_in=('meson.build', r"project\(\s*'libvirt',[^)]*?"
                r"\bversion: '(11\.3\.[^']+)'"),
    subprojects=('keycodemapdb',),
    get_subprojects='git submodule update --init subprojects/{}')
PROJECTS = {project.name: project for project in (QEMU, LIBVIRT)}


def arguments(option=None, rest=''):
    """What the command line says: the project that the first argument names
    (default: QEMU), whether `option` comes next, and all that follows, which
    there must be if `rest` tells what it is."""
    name, args = Path(sys.argv[0]).name, sys.argv[1:]
    project = PROJECTS[args.pop(0)] if args[:1] and args[0] in PROJECTS \
        else QEMU
    given = bool(option) and args[:1] == [option]
    args = args[given:]
    if bool(args) != bool(rest):
        words = [name, f'[{"|".join(PROJECTS)}]', option and f'[{option}]',
                 rest]
        raise Refused('usage: ' + ' '.join(filter(None, words)))
    return project, given, args


def main(function):
    """Run a tool's main function.

    A refusal is an error message, not a trace; SIGTERM unwinds, so that
    temporary files and started programs go away.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        function()
    except Refused as e:
        sys.exit(f'{Path(sys.argv[0]).name}: {e}')


def top(which):
    """The folder of one of QEMU's trees (see tools/build), with its obj."""
    return BUILD if which == 'series' else BUILD / which


class Tree:
    """The repository at `path`; git() runs there, text() gives its output."""

    def __init__(self, path=QEMU.src):
        self.path = Path(path)
        self.state_file = self.path / '.git' / 'series-state'

    def git(self, *args, index=None, work_tree=None, env=None, check=True,
            input=''):
        """Run git; `index` and `work_tree` replace the tree's own."""
        full = {k: v for k, v in os.environ.items()
                if not k.startswith('GIT_')} | ENV | (env or {})
        full['GIT_DIR'] = str(self.path / '.git')
        full['GIT_WORK_TREE'] = str(work_tree or self.path)
        if index:
            full['GIT_INDEX_FILE'] = str(index)
        # Not text mode: that would turn CRLF into LF.
        done = subprocess.run(['git', *args], cwd=work_tree or self.path,
                              env=full, capture_output=True,
                              input=input.encode(*UTF8))
        done.stdout = done.stdout.decode(*UTF8)
        done.stderr = done.stderr.decode(*UTF8)
        if check and done.returncode:
            raise Refused(f'git {" ".join(args)} in {self.path}:\n'
                          f'{done.stderr.strip()}')
        return done

    def text(self, *args, **kwargs):
        return self.git(*args, **kwargs).stdout.strip()

    def exists(self):
        return (self.path / '.git').is_dir()

    def init(self):
        self.path.mkdir(parents=True)
        self.git('init', '-q', '-b', 'series')
        self.git('config', 'gc.auto', '0')
        # Bytes go in and out as they are, whatever .gitattributes say.
        (self.path / '.git/info').mkdir(exist_ok=True)
        (self.path / '.git/info/attributes').write_text(
            '* -text -filter -ident !working-tree-encoding\n')
        # What a build leaves in the source; libvirt has no .gitignore.
        (self.path / '.git/info/exclude').write_text('__pycache__/\n')

    def temporary_index(self):
        return tempfile.TemporaryDirectory(prefix='index-',
                                           dir=self.path / '.git')

    def state(self):
        """What was prepared last (head, series, source), or {}."""
        try:
            return json.loads(self.state_file.read_text())
        except FileNotFoundError:
            return {}

    def set_state(self, **state):
        temporary = self.state_file.with_suffix('.new')
        temporary.write_text(json.dumps(state, indent=1) + '\n')
        temporary.replace(self.state_file)

    def head(self):
        return self.text('rev-parse', '--verify', 'HEAD')

    def edits(self):
        """Uncommitted changes, as `git status --short` lines."""
        return self.text('status', '--short', '--untracked-files=all')

    def files(self, commit):
        """All paths in a commit, as a set."""
        return set(self.git('ls-tree', '-r', '-z', '--name-only', commit)
                   .stdout.split('\0')) - {''}

    def import_base(self, source, message):
        """Commit the directory `source` as it is; the commit's name."""
        with self.temporary_index() as directory:
            index = Path(directory) / 'index'
            # Straight into a pack: 38,000 loose objects take a minute.
            self.git('-c', 'core.bigFileThreshold=1', 'add', '-A', '-f', '.',
                     index=index, work_tree=source)
            tree = self.text('write-tree', index=index)
        return self.text('commit-tree', tree, '-m', message, env=IDENTITY)

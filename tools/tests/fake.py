# SPDX-License-Identifier: GPL-2.0-or-later
"""A tiny project around a copy of the tools, with a tiny QEMU as its base, or
a tiny libvirt."""

import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
LINES = [f'line {n}\n' for n in range(1, 41)]
WHO = ['-c', 'user.name=Zoë Dev', '-c', 'user.email=zoe@example.org']


def make_base(path, ram=''.join(LINES)):
    """What the tools ask of a QEMU source tree, and a file to change."""
    for name in ('keycodemapdb', 'berkeley-softfloat-3',
                 'berkeley-testfloat-3'):
        (path / 'subprojects' / name).mkdir(parents=True)
        (path / 'subprojects' / name / 'meson.build').write_text('x\n')
    (path / 'migration').mkdir()
    (path / 'migration/ram.c').write_text(ram)
    (path / 'migration/other.c').write_text('other\n')
    (path / '.gitignore').write_text('*.ignored\n')
    (path / 'tracked.ignored').write_text('ignored, but part of it\n')
    (path / '.gitattributes').write_text('*.txt text eol=crlf\n')
    (path / 'a.txt').write_bytes(b'lf\ncrlf\r\n')
    for name in 'configure', 'meson.build':
        (path / name).write_text('\n')
    (path / 'VERSION').write_text('10.0.99\n')
    return path


def make_libvirt(path):
    """The same of libvirt."""
    make_base(path)
    for name in ('VERSION', 'configure', 'subprojects/berkeley-softfloat-3',
                 'subprojects/berkeley-testfloat-3'):
        (shutil.rmtree if (path / name).is_dir() else os.unlink)(path / name)
    (path / 'meson.build').write_text(
        "project(\n  'libvirt', 'c',\n  version: '11.3.0',\n)\n"
        "dependency('x', version: '11.3.9')\n")
    return path


class Project(unittest.TestCase):
    """setUp makes self.root (the project), self.base and self.build."""
    NAME, VARIABLE, TREES = 'qemu', 'QEMU_SRC', '.'
    make_base = staticmethod(make_base)

    def setUp(self):
        self.top = Path(tempfile.mkdtemp(prefix='tools-test-'))
        self.addCleanup(shutil.rmtree, self.top)
        self.root, self.build = self.top / 'project', self.top / 'build'
        self.tree = self.src(self.build)
        self.new = self.root / self.NAME
        self.patches = self.root / 'patches' / self.NAME
        shutil.copytree(TOOLS, self.root / 'tools', ignore=lambda d, names:
                        {n for n in names if n == '__pycache__'})
        self.base = self.make_base(self.top / 'base')
        self.source = self.base
        subprocess.run(['git', 'init', '-q', self.root], check=True)

    def src(self, build):
        """The prepared tree below a build directory."""
        return build / self.TREES / 'src'

    def tool(self, name, *args, build=None, **env):
        """Run a tool; (exit status, all output)."""
        full = os.environ | {'BUILD': str(build or self.build),
                             self.VARIABLE: str(self.source)} | env
        if self.NAME != 'qemu' and name != 'build-libvirt':
            args = self.NAME, *args
        done = subprocess.run([self.root / 'tools' / name, *args], env=full,
                              text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    def good(self, name, *args, **kwargs):
        status, output = self.tool(name, *args, **kwargs)
        self.assertEqual(status, 0, output)
        return output

    def refused(self, name, *args, **kwargs):
        """The tool must fail by a message of its own, not by a trace."""
        status, output = self.tool(name, *args, **kwargs)
        self.assertNotEqual(status, 0, output)
        self.assertNotIn('Traceback', output)
        return output

    def git(self, *args, tree=None):
        done = subprocess.run(['git', *WHO, *args], cwd=tree or self.tree,
                              text=True, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def commit(self, message, **files):
        """Write files (dots in names as __, / as _0) and commit them."""
        for name, content in files.items():
            path = self.tree / name.replace('_0', '/').replace('__', '.')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes)
                             else content.encode())
        self.git('add', '-A')
        self.git('commit', '-q', '-m', message)

    def topic(self, name):
        """Begin a topic."""
        self.git('commit', '-q', '--allow-empty',
                 '--date=2001-02-03T04:05:06Z', '-m',
                 f'{name}: What “{name}” does\n\nIts purpose.\n\nMore.')

    def make_series(self):
        """Two commits, made as a developer makes them, and a refresh."""
        self.good('prepare')
        self.topic('1-first')
        changed = LINES.copy()
        changed[19] = 'changed by the first\n'
        self.commit('migration: Add a helper\n\nWhat it does, and why.',
                    migration_0ram__c=''.join(changed),
                    migration_0helper__c='/* SPDX-License-Identifier: '
                    'GPL-2.0-or-later */\n')
        changed[5] = 'changed by the second\n'
        script = self.tree / 'scripts/run me'
        script.parent.mkdir(exist_ok=True)
        script.write_bytes(b'#!/bin/sh\n# SPDX-License-Identifier: MIT\n'
                           b'# \xff is not UTF-8\n')
        script.chmod(0o755)
        self.commit('scripts: Add a script',
                    migration_0ram__c=''.join(changed))
        return self.good('refresh')

    def contents(self, *folders):
        """{path: (mode, bytes)} of files below the project's folders."""
        return {p.relative_to(self.root): (p.stat().st_mode, p.read_bytes())
                for f in folders or (self.NAME, 'patches')
                for p in (self.root / f).rglob('*') if p.is_file()}

    def patch(self, number, topic='1-first'):
        return next((self.patches / topic).glob(f'{number:04}-*'))

    def patch_names(self):
        """All that is below patches/<project>/."""
        return sorted(str(p.relative_to(self.patches))
                      for p in self.patches.rglob('*') if p.is_file())

    def replace(self, path, old, new):
        text = path.read_text()
        self.assertIn(old, text)
        path.write_text(text.replace(old, new, 1))

# SPDX-License-Identifier: GPL-2.0-or-later
"""The series itself applies to each QEMU 10.0 that Debian has.

Needs the network the first time; the bases are kept in $BUILD/bases.
"""

import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import apt_source
import series
from tree import BUILD, ROOT, Tree


class Bases(unittest.TestCase):
    def base(self, suite):
        """A repository with the tag `base`, without a work tree."""
        tree = Tree(BUILD / 'bases' / suite)
        if tree.exists():
            return tree
        if not apt_source.own_entry():
            self.skipTest('apt is not configured with a Debian mirror')
        (BUILD / 'bases').mkdir(parents=True, exist_ok=True)
        new = Tree(BUILD / 'bases' / f'{suite}.new')
        shutil.rmtree(new.path, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix='unpack-', dir=BUILD) as d:
            env = {k: v for k, v in os.environ.items() if k != 'QEMU_SRC'}
            done = subprocess.run(
                [ROOT / 'tools/fetch', '--unpatched', f'{d}/qemu', suite],
                env=dict(env, BUILD=str(BUILD)), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode == 3:
                self.skipTest(done.stdout.strip().splitlines()[-2])
            self.assertEqual(done.returncode, 0, done.stdout)
            version = Path(d, 'qemu/VERSION').read_text().strip()
            new.init()
            new.git('tag', 'base',
                    new.import_base(f'{d}/qemu', f'QEMU {version}'))
        new.path.rename(tree.path)
        return tree

    def applies(self, suite):
        tree = self.base(suite)
        base = tree.text('rev-parse', 'base')
        series.build(tree, base, series.Series())

    def test_trixie(self):
        self.applies('trixie')

    def test_bookworm_backports(self):
        self.applies('bookworm-backports')

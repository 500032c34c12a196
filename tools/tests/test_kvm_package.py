# SPDX-License-Identifier: GPL-2.0-or-later
"""The KVM modules are built for the kernel that their source is of, only."""

import subprocess
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory

from tree import ROOT

OURS = '6.12.117-1~deb12u1'


def make(package_id, kvm='m'):
    """What Kbuild says with the headers of such a package."""
    kbuild = (ROOT / 'lab/nested/dkms/Kbuild').read_text()
    with TemporaryDirectory() as folder:
        generated = Path(folder) / 'include/generated'
        generated.mkdir(parents=True)
        (generated / 'package.h').write_text(
            f'#define LINUX_PACKAGE_ID "{package_id}"\n')
        (Path(folder) / 'Kbuild').write_text(
            kbuild.replace('@VERSION@', OURS))
        return subprocess.run(
            ['make', '--no-print-directory', '-f', 'Kbuild', '--eval',
             'all:; @echo $(obj-m)', f'objtree={folder}',
             f'CONFIG_KVM_X86={kvm}', 'all'],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True).stdout


class Kbuild(unittest.TestCase):
    def test_same(self):
        self.assertEqual(make(f' Debian {OURS}'), 'arch/x86/kvm/\n')

    def test_other_revision(self):
        said = make(' Debian 6.12.117-2')
        self.assertIn(OURS, said)
        self.assertIn('6.12.117-2.  Stop', said)

    def test_not_debian(self):
        self.assertIn('another kernel.  Stop', make(''))

    def test_built_in(self):
        self.assertIn('built into this kernel.  Stop',
                      make(f' Debian {OURS}', 'y'))

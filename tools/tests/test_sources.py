# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the base comes from: a user's own source, apt's mirrors."""

import os
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import apt_source
from fake import Project


class OwnSource(Project):
    def setUp(self):
        super().setUp()
        self.good('prepare', build=self.top / 'plain')
        self.tree_hash = self.tree_of('plain')

    def tree_of(self, build):
        return self.git('rev-parse', 'base^{tree}',
                        tree=self.top / build / 'src')

    def test_tarball(self):
        self.source = self.top / 'qemu-10.0.99.tar.xz'
        subprocess.run(['tar', '-C', self.top, '-cJf', self.source, 'base'],
                       check=True)
        self.good('prepare')
        self.assertEqual(self.tree_of('build'), self.tree_hash)

    def make_checkout(self):
        """As upstream's: the subprojects are not tracked."""
        self.git('init', '-q', tree=self.base)
        (self.base / '.git/info/exclude').write_text('subprojects/*/\n')
        self.git('config', 'core.autocrlf', 'false', tree=self.base)
        (self.base / '.git/info/attributes').write_text('* -text\n')
        self.git('add', '-A', '-f', ':!subprojects', tree=self.base)
        self.git('commit', '-q', '-m', 'x', tree=self.base)

    def test_checkout_head(self):
        self.make_checkout()
        (self.base / 'migration/other.c').write_text('uncommitted\n')
        self.assertIn('uncommitted changes; HEAD is used',
                      self.good('prepare'))
        self.assertEqual(self.tree_of('build'), self.tree_hash)

    def test_checkout_without_subprojects(self):
        self.make_checkout()
        (self.base / 'subprojects/keycodemapdb/meson.build').unlink()
        output = self.refused('prepare')
        self.assertIn('meson subprojects download keycodemapdb', output)
        self.assertEqual(list(self.build.iterdir()), [])

    def test_a_build_directory_is_left_out(self):
        (self.base / 'build').mkdir()
        (self.base / 'build/build.ninja').write_text('x\n')
        self.good('prepare')
        self.assertEqual(self.tree_of('build'), self.tree_hash)

    def test_not_qemu(self):
        (self.base / 'configure').unlink()
        self.assertIn('is not a QEMU source tree (no configure)',
                      self.refused('prepare'))

    def test_nothing_there(self):
        self.source = self.top / 'nowhere'
        self.assertIn('no such file', self.refused('prepare'))


ONE_LINE = '''
# deb http://commented.example/debian bookworm main
deb cdrom:[Debian 12]/ bookworm main
deb http://security.example/debian-security bookworm-security main
deb [arch=amd64 signed-by=/keys/own.gpg] http://one.example:81/d/ bookworm \
main contrib # comment
deb-src http://src.example/debian bookworm main
'''
DEB822 = '''# a comment
Types: deb
URIs: http://disabled.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb deb-src
# another
URIs: https://two.example/debian
Suites: bookworm
 bookworm-updates
Components: main non-free-firmware
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----
'''
OS_RELEASE = 'NAME="Debian GNU/Linux"\nID=debian\nVERSION_CODENAME=bookworm\n'


class AptSource(unittest.TestCase):
    """Reads a configuration of its own, through apt-config as always."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.etc = Path(directory.name)
        (self.etc / 'parts').mkdir()
        (self.etc / 'os-release').write_text(OS_RELEASE)
        (self.etc / 'apt.conf').write_text(
            f'Dir::Etc::sourcelist "{self.etc}/list";\n'
            f'Dir::Etc::sourceparts "{self.etc}/parts";\n')
        patch = mock.patch.dict(os.environ, {
            'APT_CONFIG': f'{self.etc}/apt.conf',
            'OS_RELEASE': f'{self.etc}/os-release'})
        patch.start()
        self.addCleanup(patch.stop)

    def apt_reads(self, entry):
        """The addresses that apt itself makes of an entry."""
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, 'x.sources').write_text(entry)
            return subprocess.run(
                ['apt-get', 'update', '--print-uris', '-o',
                 f'Dir::Etc::sourceparts={directory}', '-o',
                 'Dir::Etc::sourcelist=/dev/null'], check=True,
                capture_output=True, text=True).stdout

    def test_one_line_format(self):
        (self.etc / 'list').write_text(ONE_LINE)
        entry = apt_source.private_entry('trixie', 'deb-src')
        self.assertIn('Signed-By: /keys/own.gpg\n', entry)
        self.assertNotIn('amd64', entry)
        self.assertIn("'http://one.example:81/d/dists/trixie/main/source/",
                      self.apt_reads(entry))

    def test_deb822_format(self):
        (self.etc / 'parts/debian.sources').write_text(DEB822)
        entry = apt_source.private_entry('trixie', 'deb-src')
        self.assertIn('\n abc\n', entry)
        self.assertIn("'https://two.example/debian/dists/trixie/main/source/",
                      self.apt_reads(entry))

    def test_sites(self):
        (self.etc / 'list').write_text(
            ONE_LINE + 'deb file:/srv/mirror bookworm main\n')
        self.assertEqual(apt_source.sites(), {
            'security.example', 'one.example', 'src.example', 'srv/mirror'})

    def test_no_mirror(self):
        (self.etc / 'list').write_text(
            'deb http://x.example/ubuntu jammy main\n')
        self.assertIsNone(apt_source.private_entry('trixie'))
        (self.etc / 'os-release').write_text('ID=other\n')
        (self.etc / 'list').write_text(ONE_LINE)
        self.assertIsNone(apt_source.private_entry('trixie'))

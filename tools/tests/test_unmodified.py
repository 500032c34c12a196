# SPDX-License-Identifier: GPL-2.0-or-later
"""The unmodified QEMU that restores: from a tiny archive, or built."""

import re
import subprocess
from pathlib import Path

from fake import Project

RELEASE = 'ID=debian\nVERSION_CODENAME=bookworm\n'
QEMU = '''
#include <stdio.h>
int main(int argc, char **argv)
{
    printf("QEMU emulator version %s\\n", VERSION);
    for (int i = 0; i < argc; i++) {
        printf("%s ", argv[i]);
    }
    return 0;
}
'''
BUILD = '''#!/bin/sh
echo "building $1"
'''


class Unmodified(Project):
    def setUp(self):
        super().setUp()
        self.archive = self.top / 'archive'
        (self.top / 'os-release').write_text(RELEASE)
        (self.top / 'list').write_text(
            f'deb [trusted=yes] file:{self.archive} bookworm main\n')
        (self.top / 'apt.conf').write_text(
            f'Dir::Etc::sourcelist "{self.top}/list";\n'
            'Dir::Etc::sourceparts "/dev/null";\n')
        (self.root / 'tools/build').write_text(BUILD)

    def run_it(self):
        """The path that it prints, and its other output."""
        output = self.good('unmodified', APT_CONFIG=str(self.top / 'apt.conf'),
                           OS_RELEASE=str(self.top / 'os-release'))
        *notes, path = output.splitlines()
        return Path(path), '\n'.join(notes)

    def package(self, name, version, files, depends=''):
        folder = self.top / 'package'
        for path, source in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(['cp', '-L', source, target], check=True)
        (folder / 'DEBIAN').mkdir(parents=True, exist_ok=True)
        (folder / 'DEBIAN/control').write_text(
            f'Package: {name}\nVersion: {version}\nArchitecture: amd64\n'
            f'Maintainer: x <x@example.org>\n{depends}Description: x\n')
        subprocess.run(['dpkg-deb', '-b', folder, self.archive],
                       check=True, stdout=subprocess.DEVNULL)
        subprocess.run(['rm', '-r', folder], check=True)

    def publish(self, suite, version):
        """An archive of a QEMU and its C library."""
        self.archive.mkdir()
        source, program = self.top / 'qemu.c', self.top / 'qemu'
        source.write_text(QEMU)
        subprocess.run(['gcc', f'-DVERSION="{version}"', '-o', program,
                        source], check=True)
        listed = subprocess.run(['ldd', program], check=True, text=True,
                                capture_output=True).stdout
        libraries = re.findall(r'(/\S+) \(', listed)
        self.package('libc6', '2.99', {
            f'usr/lib/x86_64-linux-gnu/{Path(path).name}': path
            for path in libraries} | {'usr/bin/su': program})
        self.package('qemu-system-x86', f'1:{version}+ds-1', {
            'usr/bin/qemu-system-x86_64': program,
            'usr/lib/x86_64-linux-gnu/qemu/hw-x.so': program},
            'Depends: libc6\n')
        binary = self.archive / f'dists/{suite}/main/binary-amd64'
        binary.mkdir(parents=True)
        packages = subprocess.run(
            ['dpkg-scanpackages', '--multiversion', '.'], cwd=self.archive,
            check=True, text=True, capture_output=True).stdout
        (binary / 'Packages').write_text(packages)
        sums = subprocess.run(['sha256sum', 'main/binary-amd64/Packages'],
                              cwd=binary.parents[1], check=True, text=True,
                              capture_output=True).stdout.split()[0]
        (binary.parents[1] / 'Release').write_text(
            f'Suite: {suite}\nCodename: {suite}\nComponents: main\n'
            'Date: Sat, 09 Aug 2025 00:00:00 UTC\n'
            f'Architectures: amd64\nSHA256:\n {sums} {len(packages)} '
            'main/binary-amd64/Packages\n')

    def test_debian_binary(self):
        self.publish('trixie', '10.0.98')
        path, notes = self.run_it()
        self.assertEqual(path, self.build / 'debian/qemu-system-x86_64')
        self.assertIn('QEMU 10.0.98', notes)
        self.assertEqual(
            {str(p.relative_to(path.parent)) for p in path.parent.rglob('*')
             if p.is_file() and p.parent.name != 'lib'},
            {'bin/qemu-system-x86_64', 'lib/qemu/hw-x.so',
             'qemu-system-x86_64'})
        # It runs with its own libraries, wherever the folder is.
        moved = self.top / 'moved folder'
        path.parent.rename(moved)
        shown = subprocess.run([moved / path.name, '-M', 'a b'], check=True,
                               text=True, capture_output=True).stdout
        self.assertRegex(shown, r'(?m)^qemu-system-x86_64 -L .* -M a b $')

    def test_a_package(self):
        """What setup takes from backports."""
        self.publish('trixie', '10.0.98')
        folder = self.top / 'got'
        folder.mkdir()
        apt = {'APT_CONFIG': str(self.top / 'apt.conf'),
               'OS_RELEASE': str(self.top / 'os-release')}
        self.good('lib/private_apt.py', 'trixie', 'libc6', folder, **apt)
        self.assertEqual([p.name for p in folder.iterdir()],
                         ['libc6_2.99_amd64.deb'])
        self.assertIn('nothing', self.refused(
            'lib/private_apt.py', 'trixie', 'nothing', folder, **apt))
        self.assertIn('sid cannot be read', self.refused(
            'lib/private_apt.py', 'sid', 'libc6', folder, **apt))

    def test_it_is_fetched_once(self):
        self.publish('trixie', '10.0.98')
        path, _ = self.run_it()
        self.archive.rename(self.top / 'away')
        self.assertEqual(self.run_it()[0], path)

    def test_another_release_is_built_instead(self):
        self.publish('trixie', '11.2.0')
        path, notes = self.run_it()
        self.assertIn('trixie has QEMU 1:11.2.0+ds-1, not 10.0', notes)
        self.assertIn('building stock', notes)
        self.assertEqual(path, self.build / 'stock/qemu-system-x86_64')

    def test_without_a_mirror_it_is_built(self):
        (self.top / 'list').write_text('')
        path, notes = self.run_it()
        self.assertIn('not configured with a Debian mirror', notes)
        self.assertEqual(path, self.build / 'stock/qemu-system-x86_64')

    def test_one_that_does_not_run_is_not_taken(self):
        self.publish('trixie', '10.0.98')
        unmodified = self.root / 'tools/unmodified'
        self.replace(unmodified, '$here/lib/ld-linux', '$here/lib/no-linux')
        path, notes = self.run_it()
        self.assertIn('the QEMU of trixie does not run here', notes)
        self.assertEqual(path, self.build / 'stock/qemu-system-x86_64')

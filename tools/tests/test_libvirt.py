# SPDX-License-Identifier: GPL-2.0-or-later
"""The second project: its own source, tree and series, by the same tools."""

import hashlib
import os
import shutil
import subprocess

import fake
import test_series


class Libvirt(fake.Project):
    NAME, VARIABLE, TREES = 'libvirt', 'LIBVIRT_SRC', 'libvirt'
    make_base = staticmethod(fake.make_libvirt)


class RoundTrip(Libvirt, test_series.RoundTrip):
    def test_beside_the_other(self):
        self.make_series()
        before, head = self.contents(), self.git('rev-parse', 'HEAD')
        qemu = fake.Project()
        for name in 'top', 'root', 'build':
            setattr(qemu, name, getattr(self, name))
        qemu.source = fake.make_base(self.top / 'qemu')
        qemu.tree = qemu.src(self.build)
        qemu.make_series()
        qemu.good('series')
        self.good('series')
        for project in self, qemu:
            mails = project.tree.parent / 'series/1-first'
            self.assertEqual(len(list(mails.iterdir())), 3)
        self.assertEqual(self.git('rev-parse', 'HEAD'), head)
        after = self.contents()
        self.assertEqual({path: after[path] for path in before}, before)
        self.assertEqual(self.good('prepare') + qemu.good('prepare'), '')


class Messages(Libvirt):
    """What is refused is named as libvirt's."""

    def test_series(self):
        self.assertIn('run make libvirt first', self.refused('refresh'))
        self.assertIn('run tools/prepare libvirt', self.refused('series'))
        self.make_series()
        (self.new / 'stray.c').write_text('stray\n')
        self.assertIn('libvirt/stray.c is listed by no patch',
                      self.refused('prepare'))
        self.assertIn('run tools/prepare libvirt', self.refused('lint'))
        self.assertIn('libvirt/ or patches/libvirt/ changed',
                      self.refused('refresh'))
        (self.new / 'stray.c').unlink()
        self.patch(0).unlink()
        self.assertIn('patches/libvirt/1-first must have',
                      self.refused('prepare'))

    def test_a_project_that_is_none(self):
        self.NAME = 'libvrit'
        for tool in 'prepare', 'refresh', 'series', 'lint', 'bisect':
            self.assertIn('[qemu|libvirt]', self.refused(tool))
        self.assertFalse(self.build.exists())

    def test_lint(self):
        self.make_series()
        (self.root / 'elsewhere.sh').write_text('not of this series (\n')
        self.good('lint')
        self.topic('2-second')
        self.commit('no area\n\n' + 'long ' * 20,
                    docs_0new__rst='new ' + 'd' * 77, new__c='x\n' * 701,
                    migration_0other__c='x\n' * 401)
        self.good('refresh')
        status, output = self.tool('lint')
        self.assertEqual(status, 1, output)
        for text in ('the subject is not', 'longer than 76: long',
                     'libvirt/docs/new.rst: longer than 80: new',
                     'adds 401 lines', 'libvirt/new.c has 701 lines',
                     'libvirt/new.c has no SPDX'):
            self.assertIn(text, output)
        self.assertIn('\nok   `git am`', output)
        self.assertNotIn('checkpatch', output)
        self.assertRegex(output, r'\n\d passed, 4 failed, \d skipped\n\Z')


class Builds(Libvirt):
    def setUp(self):
        super().setUp()
        self.make_series()

    def stub(self, path, script):
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/bin/sh\n' + script)
        path.chmod(0o755)

    def calls(self):
        calls = self.build / 'calls'
        text = calls.read_text()
        calls.unlink()
        return text.splitlines()

    def test_bisect(self):
        self.stub(self.root / 'tools/build-libvirt',
                  'cd "$BUILD/libvirt/bisect/src"\n'
                  'echo "$* $(git log -1 --format=%s)" >>"$BUILD/calls"\n')
        self.good('bisect')
        self.assertEqual(self.calls(), ['bisect migration: Add a helper',
                                        'bisect scripts: Add a script'])

    def build_it(self, *args):
        """What is called for that."""
        self.good('build-libvirt', *args, JOBS='',
                  PATH=f'{self.top / "bin"}:{os.environ["PATH"]}')
        return self.calls()

    def test_build(self):
        for name in 'meson', 'ninja':
            self.stub(self.top / 'bin' / name,
                      f'echo "{name} $*" >>"$BUILD/calls"\n'
                      'for last; do :; done\n'
                      f'[ {name} != meson ] || mkdir -p "$last/../obj"\n')
        for which, trees in ('series', 'libvirt'), ('stock', 'libvirt/stock'):
            top = self.build / trees
            meson, ninja = self.build_it(which, 'some/target')
            self.assertRegex(meson, f'meson setup .* {top}/obj {top}/src$')
            self.assertEqual(ninja, f'ninja -C {top}/obj some/target')
            self.assertRegex(*self.build_it(which), r'^ninja .*/virtqemud ')
        stock = self.build / 'libvirt/stock/src'
        self.assertEqual((stock / 'migration/ram.c').read_text(),
                         ''.join(fake.LINES))
        self.assertFalse((stock / 'migration/helper.c').exists())
        self.replace(self.root / 'tools/build-libvirt', 'enabled', 'auto')
        self.assertEqual(len(self.build_it('stock')), 2)


class Source(Libvirt):
    def test_not_libvirt(self):
        for old, new in ("'libvirt'", "'libvirt-glib'"), ('11.3.0', '11.4.0'):
            shutil.copy(self.base / 'meson.build', self.top / 'meson.build')
            self.replace(self.base / 'meson.build', old, new)
            self.assertIn('not a libvirt 11.3 source tree (see meson.build)',
                          self.refused('prepare'))
            shutil.copy(self.top / 'meson.build', self.base / 'meson.build')
        (self.base / 'meson.build').unlink()
        self.assertIn('not a libvirt source tree (no meson.build)',
                      self.refused('prepare'))
        self.source = self.top / 'nowhere'
        self.assertIn('LIBVIRT_SRC=', self.refused('prepare'))

    def test_without_the_submodule(self):
        (self.base / 'subprojects/keycodemapdb/meson.build').unlink()
        self.assertIn('git submodule update --init subprojects/keycodemapdb',
                      self.refused('prepare'))

    def publish(self, version):
        """An archive with a source package, of which only upstream's tarball
        is of any use; what tools need in the environment to see it."""
        archive = self.top / 'archive'
        suite = archive / 'dists/trixie'
        index = suite / 'main/source/Sources'
        index.parent.mkdir(parents=True)
        orig = archive / f'libvirt_{version}.orig.tar.xz'
        subprocess.run(['tar', '-C', self.top, '-cJf', orig, 'base'],
                       check=True)
        dsc = archive / f'libvirt_{version}-1.dsc'
        dsc.write_text('x\n')

        def line(path, folder):
            content = path.read_bytes()
            return (f' {hashlib.sha256(content).hexdigest()} {len(content)} '
                    f'{path.relative_to(folder)}\n')

        index.write_text(
            f'Package: libvirt\nBinary: libvirt0\nVersion: {version}-1\n'
            'Architecture: any\nFormat: 3.0 (quilt)\nDirectory: .\n'
            f'Checksums-Sha256:\n{line(dsc, archive)}{line(orig, archive)}')
        (suite / 'Release').write_text(
            'Suite: trixie\nCodename: trixie\nComponents: main\n'
            'Date: Sat, 09 Aug 2025 00:00:00 UTC\n'
            f'Architectures: amd64\nSHA256:\n{line(index, suite)}')
        (self.top / 'os-release').write_text(
            'ID=debian\nVERSION_CODENAME=bookworm\n')
        (self.top / 'list').write_text(
            f'deb [trusted=yes] copy:{archive} bookworm main\n')
        (self.top / 'apt.conf').write_text(
            f'Dir::Etc::sourcelist "{self.top}/list";\n'
            'Dir::Etc::sourceparts "/dev/null";\n')
        return {'LIBVIRT_SRC': '', 'APT_CONFIG': str(self.top / 'apt.conf'),
                'OS_RELEASE': str(self.top / 'os-release')}

    def test_upstreams_tarball(self):
        env = self.publish('11.3.0')
        self.assertIn('libvirt 11.3.0 with 0 patches',
                      self.good('prepare', **env))
        self.assertEqual([p.name for p in
                          self.build.glob('download/libvirt-trixie/*')],
                         ['libvirt_11.3.0.orig.tar.xz'])
        base = self.git('rev-parse', 'base')
        # It is kept; and it is what the same source gives otherwise.
        shutil.rmtree(self.top / 'archive')
        shutil.rmtree(self.tree)
        self.good('prepare', **env)
        self.assertEqual(self.git('rev-parse', 'base'), base)
        other = self.top / 'other'
        self.good('prepare', build=other)
        self.assertEqual(self.git('rev-parse', 'base', tree=self.src(other)),
                         base)

    def test_another_release(self):
        output = self.refused('prepare', **self.publish('12.0.0'))
        self.assertIn('trixie has libvirt 12.0.0-1, not 11.3', output)
        self.assertIn('make libvirt LIBVIRT_SRC=', output)

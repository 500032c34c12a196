# SPDX-License-Identifier: GPL-2.0-or-later
"""prepare, refresh, series: the way there and back loses nothing."""

import email
import email.policy
import os
import re
import shutil
import subprocess
import unittest
from pathlib import Path

from fake import LINES, Project, make_base


class RoundTrip(Project):
    def test_same_tree_everywhere(self):
        self.make_series()
        tree = self.git('rev-parse', 'HEAD^{tree}')
        head = self.git('rev-parse', 'HEAD')
        other = self.top / 'other'
        self.good('prepare', build=other)
        src = self.src(other)
        self.assertEqual(self.git('rev-parse', 'HEAD^{tree}', tree=src), tree)
        self.assertEqual(self.git('rev-parse', 'HEAD', tree=src),
                         head, 'the commits are reproducible')
        # What .gitignore and .gitattributes say must not change the base.
        self.assertEqual((src / 'a.txt').read_bytes(), b'lf\ncrlf\r\n')
        self.assertTrue((src / 'tracked.ignored').exists())
        mails = self.good('series')
        self.assertIn('2 mails', mails)
        self.git('checkout', '-q', '--detach', 'base')
        self.git('am', '--empty=drop', *sorted(
            map(str, self.build.glob(f'{self.TREES}/series/*/*.patch'))))
        self.assertEqual(self.git('rev-parse', 'HEAD^{tree}'), tree)

    def test_refresh_is_stable(self):
        self.make_series()
        before = self.contents()
        self.assertIn('Zoë Dev', self.patch(1).read_text())
        output = self.good('refresh')
        self.assertNotIn('wrote', output)
        self.assertEqual(self.contents(), before)
        self.assertEqual(self.good('prepare'), '')

    def test_mode_and_bytes_of_a_new_file(self):
        self.make_series()
        script = self.new / 'scripts/run me'
        self.assertTrue(os.access(script, os.X_OK))
        self.assertIn(b'\xff', script.read_bytes())
        script.chmod(0o644)
        self.good('prepare')
        self.assertFalse(os.access(self.tree / 'scripts/run me', os.X_OK))

    def test_copy_of_a_large_file(self):
        self.make_series()
        data = [f'{n}: data of a test\n' for n in range(4000)]
        self.commit('tests: Add data', tests_0data=''.join(data))
        data[7] = 'one line more\n' + data[7]
        self.commit('tests: Add nearly the same', tests_0more=''.join(data))
        tree = self.git('rev-parse', 'HEAD^{tree}')
        self.good('refresh')
        self.assertTrue((self.new / 'tests/data').exists())
        self.assertFalse((self.new / 'tests/more').exists())
        patch = self.patch(4).read_text()
        self.assertIn('copy from tests/data\ncopy to tests/more\n', patch)
        self.assertEqual(re.findall(r'^[+-](?![+-]).*', patch, re.M),
                         ['+one line more'])
        self.assertNotIn('wrote', self.good('refresh'))
        other = self.top / 'other'
        self.good('prepare', build=other)
        self.assertEqual(self.git('rev-parse', 'HEAD^{tree}',
                                  tree=self.src(other)), tree)
        self.good('series')
        mails = sorted(self.build.glob(f'{self.TREES}/series/*/*.patch'))
        self.assertIn('copy from', mails[-1].read_text())
        self.git('checkout', '-q', '--detach', 'base')
        self.git('am', '--empty=drop', *map(str, mails))
        self.assertEqual(self.git('rev-parse', 'HEAD^{tree}'), tree)

    def test_refresh_removes_what_is_gone(self):
        self.make_series()
        self.git('reset', '-q', '--hard', 'HEAD^')
        self.good('refresh')
        self.assertFalse((self.new / 'scripts').exists())
        self.assertEqual(self.patch_names(), ['1-first/0000-cover-letter.txt',
                         '1-first/0001-migration-Add-a-helper.patch'])
        self.good('prepare', build=self.top / 'other')


class Topics(Project):
    NAMES = ['1-first/0000-cover-letter.txt',
             '1-first/0001-migration-Add-a-helper.patch',
             '1-first/0002-scripts-Add-a-script.patch',
             '2-second/0000-cover-letter.txt',
             '2-second/0001-other-Change-it.patch',
             '2-second/0002-other-Once-more.patch']

    def setUp(self):
        super().setUp()
        self.make_series()
        self.topic('2-second')
        self.commit('other: Change it', migration_0other__c='changed\n',
                    new__c='new\n')
        self.commit('other: Once more', migration_0other__c='again\n')
        self.good('refresh')

    def test_folders(self):
        self.assertEqual(self.patch_names(), self.NAMES)
        cover = self.patch(0, '2-second').read_text()
        self.assertRegex(cover, r'\AFrom: Zoë Dev <zoe@example.org>\n'
                         r'Date: .*\n'
                         'Subject: What “2-second” does\n\n'
                         r'Its purpose.\n\nMore.\n\Z')
        self.assertEqual(self.git('log', '--format=%s', 'base..'), '\n'.join((
            'other: Once more', 'other: Change it',
            '2-second: What “2-second” does', 'scripts: Add a script',
            'migration: Add a helper', '1-first: What “1-first” does')))
        self.assertIn('with 4 patches',
                      self.good('prepare', build=self.top / 'other'))
        self.assertEqual(self.git('rev-parse', 'HEAD'), self.git(
            'rev-parse', 'HEAD', tree=self.top / 'other/src'))

    def test_a_cover_letter_changes(self):
        self.replace(self.patch(0, '2-second'), 'Its purpose.', 'Why it is.')
        self.good('prepare')
        self.assertIn('Why it is.',
                      self.git('log', '-1', '--format=%b', 'HEAD~2'))
        self.git('commit', '-q', '--amend', '--allow-empty', '-m', 'x')
        self.refused('prepare', '--saved')

    def test_mails_topic_by_topic(self):
        (self.build / 'series').mkdir()
        (self.build / 'series/stale.patch').touch()
        output = self.good('series')
        self.assertEqual({p.name for p in self.build.glob('series/*')},
                         {'1-first', '2-second'})
        ends = self.git('rev-parse', 'HEAD~3^{tree}', 'HEAD^{tree}').split()
        self.assertNotEqual(*ends)
        self.git('checkout', '-q', '-b', 'pristine', 'base')
        for name, end in zip(('1-first', '2-second'), ends):
            command = (f'git am --empty=drop {self.build}/series/{name}/'
                       '*.patch')
            self.assertIn(command, output)
            subprocess.run(command, shell=True, check=True, cwd=self.tree,
                           capture_output=True,
                           env=dict(os.environ, GIT_COMMITTER_NAME='x',
                                    GIT_COMMITTER_EMAIL='x@example.org'))
            self.assertEqual(self.git('rev-parse', 'HEAD^{tree}'), end)
        self.assertEqual(self.git('rev-list', '--count', 'base..'), '4')

    def test_cover_letters(self):
        self.good('series')
        first = {p: p.read_bytes() for p in self.build.glob('series/*/*')}
        for name in '1-first', '2-second':
            mails = [email.message_from_bytes(p.read_bytes(),
                                              policy=email.policy.default)
                     for p in sorted(self.build.glob(f'series/{name}/*'))]
            self.assertEqual([re.match(r'\[.*?\]', mail['Subject'])[0]
                              for mail in mails],
                             ['[PATCH 0/2]', '[PATCH 1/2]', '[PATCH 2/2]'])
            self.assertEqual(mails[0]['Subject'],
                             f'[PATCH 0/2] What “{name}” does')
            self.assertEqual(mails[0]['From'], 'Zoë Dev <zoe@example.org>')
            self.assertIn('3 Feb 2001 04:05:06 +0000', mails[0]['Date'])
            text = mails[0].get_content()
            self.assertRegex(text, r'\AIts purpose.\n\nMore.\n\n'
                             r'Zoë Dev \(2\):\n')
            self.assertIn(' 2 files changed' if name == '2-second'
                          else ' 3 files changed', text)
            self.assertNotIn('***', text)
        self.good('series')
        self.assertEqual(first, {p: p.read_bytes() for p in
                                 self.build.glob('series/*/*')})
        self.assertEqual(self.git('for-each-ref', '--format=%(refname)'),
                         'refs/heads/series\nrefs/tags/base')

    def test_a_topic_that_is_gone(self):
        self.git('reset', '-q', '--hard', 'HEAD~3')
        self.good('refresh')
        self.assertEqual(self.patch_names(), self.NAMES[:3])
        self.assertFalse((self.root / 'patches/qemu/2-second').exists())
        self.assertFalse((self.root / 'qemu/new.c').exists())

    def test_a_topic_in_two(self):
        self.git('reset', '-q', '--hard', 'HEAD^')
        self.topic('3-third')
        self.commit('other: Once more', migration_0other__c='again\n')
        self.good('refresh')
        self.assertEqual(self.patch_names(), self.NAMES[:5] + [
            '3-third/0000-cover-letter.txt',
            '3-third/0001-other-Once-more.patch'])

    def test_from_a_series_without_folders(self):
        before, patches = self.contents(), self.root / 'patches/qemu'
        for number, name in enumerate(self.NAMES):
            if name.endswith('.patch'):
                (patches / name).rename(
                    patches / f'{number:04}{Path(name).name[4:]}')
        for name in '1-first', '2-second':
            shutil.rmtree(patches / name)
        self.good('prepare')
        head = self.git('rev-parse', 'HEAD')
        self.git('reset', '-q', '--hard', 'base')
        self.topic('1-first')
        self.git('cherry-pick', f'base..{head}~2')
        self.topic('2-second')
        self.git('cherry-pick', f'{head}~2..{head}')
        self.good('refresh')
        # The markers are new and so are their dates.
        after = self.contents()
        self.assertEqual(after.keys(), before.keys())
        for name in before:
            if name.suffix != '.txt':
                self.assertEqual(after[name], before[name])


class Updates(Project):
    def test_unchanged_files_keep_their_times(self):
        self.make_series()
        old = 1_000_000_000
        for path in self.tree.rglob('*.c'):
            os.utime(path, (old, old))
        self.git('update-index', '-q', '--refresh')
        self.replace(self.root / 'qemu/migration/helper.c', 'SPDX', '\nSPDX')
        self.good('prepare')
        changed = {p.name for p in self.tree.rglob('*.c')
                   if p.stat().st_mtime != old}
        self.assertEqual(changed, {'helper.c'})

    def test_another_source_replaces_the_base(self):
        self.make_series()
        self.source = make_base(self.top / 'base2',
                                'offset\n' + ''.join(LINES))
        self.good('prepare')
        text = (self.tree / 'migration/ram.c').read_text()
        self.assertTrue(text.startswith('offset\n'))
        self.assertIn('changed by the first', text)


class DoesNotFit(Project):
    def setUp(self):
        super().setUp()
        self.make_series()
        changed = LINES.copy()
        changed[17] = 'upstream moved on\n'
        self.source = make_base(self.top / 'base2', ''.join(changed))

    def assert_names_the_hunk(self, output):
        self.assertIn('0001-migration-Add-a-helper.patch', output)
        self.assertIn('10.0.99', output)
        self.assertRegex(output, r'migration/ram.c: @@ -17,7 \+17,7 @@')

    def test_nothing_is_left_behind(self):
        other = self.top / 'other'
        self.assert_names_the_hunk(self.refused('prepare', build=other))
        self.assertEqual(list(other.iterdir()), [])

    def test_the_tree_stays_as_it_was(self):
        head, base = self.git('rev-parse', 'HEAD', 'base').split()
        self.assert_names_the_hunk(self.refused('prepare'))
        self.assertEqual(self.git('rev-parse', 'HEAD', 'base').split(),
                         [head, base])
        self.assertEqual(self.git('status', '--short'), '')
        self.assertEqual([p.name for p in self.build.iterdir()], ['src'])

    def test_no_fuzz(self):
        # Context that differs by one line is enough for patch(1).
        self.source = make_base(self.top / 'base3', ''.join(
            LINES[:16] + ['other context\n'] + LINES[17:]))
        self.assert_names_the_hunk(self.refused('prepare'))


if __name__ == '__main__':
    unittest.main()

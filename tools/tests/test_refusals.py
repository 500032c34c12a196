# SPDX-License-Identifier: GPL-2.0-or-later
"""Mistakes in the series are named; work in the tree is never lost."""

import re
import shutil

from fake import Project


class Listing(Project):
    """What ties patches and new files together, in prepare and lint."""

    def setUp(self):
        super().setUp()
        self.make_series()

    def both_refuse(self, *texts):
        output = self.refused('prepare')
        for text in texts:
            self.assertIn(text, output)
        # lint looks at the tree of another series: it must not pass.
        self.refused('lint')

    def test_listed_twice(self):
        self.replace(self.patch(2), 'New-file: ',
                     'New-file: migration/helper.c\nNew-file: ')
        self.both_refuse('migration/helper.c is listed by 1-first/0001-',
                         'and 1-first/0002-')

    def test_exists_upstream(self):
        (self.root / 'qemu/migration/other.c').write_text('mine\n')
        self.replace(self.patch(1), 'New-file: ',
                     'New-file: migration/other.c\nNew-file: ')
        self.both_refuse('migration/other.c', 'exists in the base')

    def test_listed_but_missing(self):
        (self.root / 'qemu/migration/helper.c').unlink()
        self.both_refuse('migration/helper.c', 'is missing below qemu/')

    def test_not_listed(self):
        (self.root / 'qemu/migration/stray.c').write_text('stray\n')
        self.both_refuse('qemu/migration/stray.c is listed by no patch')

    def test_hunk_for_a_new_file(self):
        with open(self.patch(2), 'a') as f:
            f.write('diff --git a/migration/helper.c b/migration/helper.c\n'
                    '--- a/migration/helper.c\n+++ b/migration/helper.c\n'
                    '@@ -1,1 +1,1 @@\n-a\n+b\n')
        self.both_refuse('has a hunk for migration/helper.c')

    def test_new_file_by_a_hunk(self):
        with open(self.patch(2), 'a') as f:
            f.write('diff --git a/x.c b/x.c\nnew file mode 100644\n'
                    '--- /dev/null\n+++ b/x.c\n@@ -0,0 +1,1 @@\n+b\n')
        self.both_refuse('0002-', 'goes to qemu/ with a New-file: line')

    def test_misspelt_listing(self):
        self.replace(self.patch(1), 'New-file: ', 'Newfile: ')
        self.both_refuse('Newfile: migration/helper.c', '0001-')

    def test_no_date(self):
        self.replace(self.patch(1), 'Date: ', 'When: ')
        self.both_refuse('0001-', 'no Date: line')

    def test_no_cover_letter(self):
        self.patch(0).unlink()
        self.both_refuse('patches/qemu/1-first must have 0000-cover-letter')

    def test_cover_letter_of_nothing(self):
        (self.root / 'patches/qemu/2-second').mkdir()
        shutil.copy(self.patch(0), self.root / 'patches/qemu/2-second')
        self.both_refuse('patches/qemu/2-second must have 0000-cover-letter')

    def test_cover_letter_without_text(self):
        self.replace(self.patch(0), 'Its purpose.\n\nMore.\n', '')
        self.both_refuse('1-first/0000-cover-letter.txt: a cover letter has')

    def test_name_of_a_folder(self):
        self.patch(0).parent.rename(self.root / 'patches/qemu/First')
        self.both_refuse('First/0000-cover-letter.txt: its folder')


class Lint(Project):
    def failing(self):
        status, output = self.tool('lint')
        self.assertEqual(status, 1, output)
        return [line for line in output.splitlines()
                if line.startswith('FAIL')], output

    def test_passes(self):
        self.make_series()
        status, output = self.tool('lint')
        self.assertEqual(status, 0, output)
        self.assertRegex(output.splitlines()[-1],
                         r'^\d+ passed, 0 failed, \d skipped$')

    def test_license_and_message(self):
        self.good('prepare')
        self.topic('1-first')
        self.commit('no area in this subject\n\n' + 'long ' * 20,
                    new__c='/* no license */\n')
        self.good('refresh')
        failed, output = self.failing()
        self.assertEqual(len(failed), 2, output)
        self.assertIn('qemu/new.c has no SPDX-License-Identifier', output)
        self.assertIn('the subject is not', output)
        self.assertIn('longer than 76: long', output)

    def test_widths(self):
        page = '.. SPDX-License-Identifier: MIT\n'
        (self.base / 'old.rst').write_text('a b' * 40 + '\n')
        self.good('prepare')
        self.topic('1-first')
        self.git('commit', '-q', '--amend', '--allow-empty',
                 '-m', '1-first: T', '-m', 'c' * 76 + ' c')
        self.commit('docs: Add', old__rst='a b' * 40 + '\nold ' + 'b' * 77,
                    fits__rst=page + 'x' * 99 + '\nis 80 ' + 'c' * 74,
                    new__rst=page + 'new ' + 'd' * 77)
        self.good('refresh')
        (self.root / 'README.md').write_text(
            'x' * 120 + '\nfits ' + 'y' * 95 + '\nread ' + 'y' * 96)
        failed, output = self.failing()
        self.assertEqual(failed, [
            'FAIL subjects `area: summary`, lines of at most 76 columns',
            'FAIL lines of at most 80 columns in .rst, of 100 in .md'])
        self.assertIn('1-first/0000-cover-letter.txt: longer than 76: ccc',
                      output)
        self.assertEqual(re.findall(r'\S+: longer than \d+: \w+ \w',
                                    output)[1:],
                         ['README.md: longer than 100: read y',
                          'qemu/new.rst: longer than 80: new d',
                          'old.rst: longer than 80: old b'])
        self.assertEqual(output.count('longer than'), 4, output)

    def grow(self, hunk, new):
        """Lint a commit that adds so many lines to a file and a new one."""
        self.make_series()
        head = '/* SPDX-License-Identifier: MIT */\n'
        self.commit('other: Grow', migration_0other__c='line\n' * hunk,
                    new__c=head + 'x\n' * (new - 1))
        self.good('refresh')

    def test_sizes_that_can_be_reviewed(self):
        self.grow(400, 700)
        self.good('lint')

    def test_too_large(self):
        self.grow(401, 701)
        failed, output = self.failing()
        self.assertEqual(len(failed), 1, output)
        self.assertIn('0003-other-Grow.patch adds 401 lines', output)
        self.assertIn('qemu/new.c has 701 lines', output)

    def test_checkpatch_of_all_but_cover_letters(self):
        script = self.base / 'scripts/checkpatch.pl'
        script.parent.mkdir()
        script.write_text('print "$ARGV[-1]:1: WARNING: seen\\n"; exit 1;\n')
        self.make_series()
        _, output = self.failing()
        self.assertEqual(re.findall(r'(\d{4}-).*: WARNING: seen', output),
                         ['0001-', '0002-'])

    def test_message_that_git_am_changes(self):
        self.good('prepare')
        self.topic('1-first')
        self.commit('migration: [RFC] ends well\n\nBody.\n\n-- >8 --\nlost',
                    new__c='/* SPDX-License-Identifier: MIT */\n')
        self.good('refresh')
        self.replace(self.patch(1), 'Subject: migration: ',
                     'Subject: [tag] migration: ')
        self.good('prepare')
        failed, output = self.failing()
        self.assertIn('after git am:', output)

    def test_machine_paths_and_mirrors(self):
        self.make_series()
        # Put together here, or this file would be found as well.
        home = '/ho' + 'me/somebody'
        (self.root / 'notes').write_text(f'cd {self.build}/x\n{home}/y\n')
        failed, output = self.failing()
        self.assertEqual(len(failed), 1, output)
        self.assertIn('notes:1: ', output)
        self.assertIn('notes:2: ', output)

    def test_broken_scripts(self):
        self.make_series()
        named = '# SPDX-License-Identifier: MIT\n'
        (self.root / 'a.py').write_text(named + 'def :\n')
        (self.root / 'b').write_text('#!/bin/sh\n' + named + 'if true\n')
        (self.root / 'c').write_text('#!/bin/sh\ntrue\n')
        _, output = self.failing()
        self.assertIn('a.py:2:', output)
        self.assertRegex(output, r'\bb: .*[Ss]yntax error')
        self.assertIn('c has no SPDX-License-Identifier', output)


class Unsaved(Project):
    """The series changes while the tree holds a developer's work."""

    def setUp(self):
        super().setUp()
        self.make_series()
        self.helper = self.root / 'qemu/migration/helper.c'

    def change_series(self):
        self.helper.write_text(self.helper.read_text() + '/* more */\n')

    def test_commits_survive(self):
        self.commit('migration: mine', mine__c='mine\n')
        head = self.git('rev-parse', 'HEAD')
        self.assertEqual(self.good('prepare'), '', 'nothing to do yet')
        self.assertIn('make refresh', self.refused('prepare', '--saved'))
        self.change_series()
        self.assertIn('make refresh', self.refused('prepare'))
        self.assertIn('changed since the tree was', self.refused('refresh'))
        self.assertEqual(self.git('rev-parse', 'HEAD'), head)
        self.assertIn('more', self.helper.read_text())

    def test_edits_survive(self):
        (self.tree / 'migration/other.c').write_text('edited\n')
        (self.tree / 'untracked.c').write_text('new\n')
        self.change_series()
        output = self.refused('prepare')
        self.assertIn('migration/other.c', output)
        self.assertIn('untracked.c', output)
        self.assertEqual((self.tree / 'migration/other.c').read_text(),
                         'edited\n')

    def test_clean_tree_is_updated(self):
        self.good('prepare', '--saved')
        self.change_series()
        self.good('prepare')
        self.assertIn('more',
                      (self.tree / 'migration/helper.c').read_text())

    def test_a_tree_of_unknown_origin(self):
        (self.tree / '.git/series-state').unlink()
        self.assertIn('was not made by this tool', self.refused('prepare'))


class Refresh(Project):
    def setUp(self):
        super().setUp()
        self.make_series()
        self.before = self.contents()

    def tearDown(self):
        self.assertEqual(self.contents(), self.before)

    def test_uncommitted(self):
        (self.tree / 'migration/other.c').write_text('edited\n')
        output = self.refused('refresh')
        self.assertIn('git commit --fixup', output)
        self.assertIn('migration/other.c', output)

    def test_later_change_of_a_new_file(self):
        self.commit('migration: later', migration_0helper__c='later\n')
        output = self.refused('refresh')
        self.assertIn('migration/helper.c', output)
        self.assertIn('migration: Add a helper', output)
        self.assertIn('autosquash', output)

    def test_deletion(self):
        self.git('rm', '-q', 'migration/other.c')
        self.commit('migration: drop')
        self.assertIn('cannot hold this', self.refused('refresh'))

    def test_symbolic_link(self):
        (self.tree / 'link').symlink_to('VERSION')
        self.commit('migration: link')
        self.assertIn('cannot hold this', self.refused('refresh'))

    def test_message_that_ends_the_mail(self):
        self.commit('migration: x\n\nabove\n---\nbelow', x__c='x\n')
        self.assertIn('start of the changes', self.refused('refresh'))

    def test_no_topic(self):
        self.git('reset', '-q', '--hard', 'base')
        self.commit('migration: x', x__c='x\n')
        self.assertIn('first commit must be the marker',
                      self.refused('refresh'))

    def test_marker_with_changes(self):
        self.commit('2-second: Title\n\nText.', x__c='x\n')
        self.assertIn('must not change anything', self.refused('refresh'))

    def test_order_of_topics(self):
        self.topic('1-a')
        self.commit('migration: x', x__c='x\n')
        self.assertIn('this one follows 1-first', self.refused('refresh'))

    def test_topic_twice(self):
        self.topic('1-first')
        self.commit('migration: x', x__c='x\n')
        self.assertIn('this one follows 1-first', self.refused('refresh'))

    def test_empty_commit(self):
        self.git('commit', '-q', '--allow-empty', '-m', 'migration: nothing')
        self.assertIn('changes nothing', self.refused('refresh'))

    def test_merge(self):
        self.git('checkout', '-q', '-b', 'side', 'HEAD^')
        self.commit('migration: side', side__c='side\n')
        self.git('checkout', '-q', 'series')
        self.git('merge', '-q', '--no-ff', '-m', 'merge', 'side')
        self.assertIn('linear', self.refused('refresh'))

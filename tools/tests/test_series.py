# SPDX-License-Identifier: GPL-2.0-or-later
"""prepare, refresh, series: the way there and back loses nothing."""

import os
import unittest

from fake import LINES, Project, make_base


class RoundTrip(Project):
    def test_same_tree_everywhere(self):
        self.make_series()
        tree = self.git('rev-parse', 'HEAD^{tree}')
        head = self.git('rev-parse', 'HEAD')
        other = self.top / 'other'
        self.good('prepare', build=other)
        self.assertEqual(self.git('rev-parse', 'HEAD^{tree}',
                                  tree=other / 'src'), tree)
        self.assertEqual(self.git('rev-parse', 'HEAD', tree=other / 'src'),
                         head, 'the commits are reproducible')
        # What .gitignore and .gitattributes say must not change the base.
        self.assertEqual((other / 'src/a.txt').read_bytes(), b'lf\ncrlf\r\n')
        self.assertTrue((other / 'src/tracked.ignored').exists())
        mails = self.good('series')
        self.assertIn('2 mails', mails)
        self.git('checkout', '-q', '--detach', 'base')
        self.git('am', *sorted(map(str, self.build.glob('series/*.patch'))))
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
        script = self.root / 'qemu/scripts/run me'
        self.assertTrue(os.access(script, os.X_OK))
        self.assertIn(b'\xff', script.read_bytes())
        script.chmod(0o644)
        self.good('prepare')
        self.assertFalse(os.access(self.tree / 'scripts/run me', os.X_OK))

    def test_refresh_removes_what_is_gone(self):
        self.make_series()
        self.git('reset', '-q', '--hard', 'HEAD^')
        self.good('refresh')
        self.assertFalse((self.root / 'qemu/scripts').exists())
        self.assertEqual(len(list(self.root.glob('patches/qemu/*'))), 1)
        self.good('prepare', build=self.top / 'other')


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

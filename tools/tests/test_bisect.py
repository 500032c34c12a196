# SPDX-License-Identifier: GPL-2.0-or-later
"""bisect builds and tests each commit, and each topic without the next."""

from fake import Project

# Says what it is called for and with which commit, and fails where told to.
STEP = '''#!/bin/sh
subject=$(git -C "$BUILD/bisect/src" log -1 --format=%s)
echo "$(basename "$0") $*: $subject" | tee -a "$BUILD/steps"
[ "$(basename "$0") $subject" != "$FAILING" ]
'''


class Bisect(Project):
    def setUp(self):
        super().setUp()
        self.make_series()
        self.topic('2-second')
        self.commit('other: Change it', migration_0other__c='changed\n')
        self.topic('3-third')
        self.commit('other: Once more', migration_0other__c='again\n')
        self.good('refresh')
        for name in 'build', 'unit', 'qtest':
            (self.root / 'tools' / name).write_text(STEP)

    def steps(self):
        steps = self.build / 'steps'
        text = steps.read_text()
        steps.unlink()
        return text.splitlines()

    def all_steps(self, subject, topic=False):
        return [f'{step}: {subject}' for step in (
            'build bisect', 'unit bisect',
            *(('build stock', 'qtest bisect') if topic else ()))]

    def test_all_commits(self):
        output = self.good('bisect', FAILING='')
        self.assertEqual(
            self.steps(), self.all_steps('migration: Add a helper')
            + self.all_steps('scripts: Add a script', True)
            + self.all_steps('other: Change it', True)
            + self.all_steps('other: Once more'))
        self.assertIn('\nqtest bisect: other: Change it\n', output)
        commit = self.git('rev-parse', 'HEAD~2')
        log = (self.build / f'logs/bisect-{commit[:12]}.log').read_text()
        self.assertEqual(log.splitlines(),
                         self.all_steps('other: Change it', True))

    def test_ends_of_topics(self):
        self.good('bisect', '--topics', FAILING='')
        self.assertEqual(
            self.steps(), self.all_steps('scripts: Add a script', True)
            + self.all_steps('other: Change it', True))

    def test_failure(self):
        for step, count in ('build', 1), ('unit', 2), ('qtest', 4):
            output = self.refused('bisect', '--topics',
                                  FAILING=f'{step} other: Change it')
            self.assertEqual(self.steps()[4:], self.all_steps(
                'other: Change it', True)[:count])
            commit = self.git('rev-parse', 'HEAD~2')
            self.assertRegex(output, f'{commit[:7]}\\S* other: Change it\n'
                             f'(.*\n)*.*{step}.*\n.*bisect-{commit[:12]}.log')

    def test_another_tree(self):
        """A work tree of a repository that is no more."""
        self.good('bisect', FAILING='')
        self.tree.rename(self.top / 'moved')
        self.good('prepare')
        self.steps()
        self.good('bisect', FAILING='')
        self.assertEqual(len(self.steps()), 12)

# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading TAP: nothing that went wrong may pass unnoticed."""

import importlib.util
import tempfile
import unittest
from importlib.machinery import SourceFileLoader
from pathlib import Path

import tap

loader = SourceFileLoader('qtest',
                          str(Path(__file__).resolve().parents[1] / 'qtest'))
qtest = importlib.util.module_from_spec(
    importlib.util.spec_from_loader('qtest', loader))
loader.exec_module(qtest)


class Run(unittest.TestCase):
    def run_script(self, script, timeout=20):
        with tempfile.NamedTemporaryFile() as log:
            return tap.run(['/bin/sh', '-c', script], log.name, timeout)

    def test_results(self):
        self.assertEqual(self.run_script(
            "printf '1..3\nok 1 /a\nok 2 /b # SKIP no kvm\nnot ok 3 /c\n';"
            'exit 1'),
            {'/a': 'ok', '/b': 'skip: no kvm', '/c': 'not ok'})

    def failure(self, script, **kwargs):
        results = self.run_script(script, **kwargs)
        failed = [p for p, r in results.items() if r == 'not ok']
        self.assertEqual(len(failed), 1, results)
        return failed[0]

    def test_death(self):
        self.assertIn('exit status -6 after /b, 1 of 2', self.failure(
            "printf '1..2\nok 1 /a\n# Running /b\n'; kill -ABRT $$"))

    def test_failing_exit(self):
        self.assertIn('exit status 3', self.failure(
            "printf '1..1\nok 1 /a\n'; exit 3"))

    def test_nothing_run(self):
        self.assertIn('exit status 0', self.failure('true'))

    def test_hang(self):
        self.assertIn('killed after 1 s', self.failure(
            "echo 1..1; sleep 30 & sleep 30", timeout=1))


class Compare(unittest.TestCase):
    def test_kinds(self):
        stock = {'/same': 'ok', '/broken': 'ok', '/lost': 'ok',
                 '/both': 'not ok', '/skipped': 'skip: x',
                 '/repaired': 'not ok'}
        ours = {'/same': 'ok', '/broken': 'not ok', '/both': 'not ok',
                '/skipped': 'skip: x', '/repaired': 'ok', '/new': 'ok',
                '/new-bad': 'not ok', '/new-skip': 'skip: y'}
        self.assertEqual(
            {path: kind for kind, path, _ in qtest.compare(ours, stock)},
            {'/same': 'ok', '/broken': 'FAIL', '/lost': 'FAIL',
             '/both': 'skip', '/skipped': 'skip', '/repaired': 'FAIL',
             '/new': 'ok', '/new-bad': 'FAIL', '/new-skip': 'skip'})

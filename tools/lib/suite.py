# SPDX-License-Identifier: GPL-2.0-or-later
"""Run tests of Python's unittest; the last line counts them."""

import sys
import unittest

from tap import summary


def run(folder, names):
    """Run test_*.py of a folder, or only some of its tests; exits."""
    sys.path.insert(0, str(folder))
    loader = unittest.TestLoader()
    suite = (loader.loadTestsFromNames(names) if names
             else loader.discover(str(folder), 'test_*.py'))
    result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout).run(suite)
    failed = len(result.failures) + len(result.errors)
    skipped = len(result.skipped)
    for test, reason in result.skipped:
        print(f'skip {test}: {reason}')
    print(summary(result.testsRun - failed - skipped, failed, skipped))
    sys.exit(failed > 0 or not result.testsRun)

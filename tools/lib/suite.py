# SPDX-License-Identifier: GPL-2.0-or-later
"""Run tests of Python's unittest, some at a time: they mostly wait.

The last line counts them.
"""

import io
import os
import sys
import unittest
from concurrent.futures import ProcessPoolExecutor

from tap import summary


def names_in(tests):
    """Of each test, or of a class whose tests have something in common."""
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            yield from names_in(test)
        elif 'setUpClass' in vars(type(test)):
            yield test.id().rpartition('.')[0]
        else:
            yield test.id()


def run_one(name):
    """Run one; what it says, how many tests have run and failed, and why some
    were skipped."""
    output = io.StringIO()
    result = unittest.TextTestRunner(verbosity=2, stream=output).run(
        unittest.defaultTestLoader.loadTestsFromName(name))
    lines = output.getvalue().splitlines()
    # Not the summary of each
    said = [line for line in lines[:-4] if line] + (
        [lines[-1]] if not result.wasSuccessful() else [])
    return ('\n'.join(said), result.testsRun,
            len(result.failures) + len(result.errors),
            [f'skip {test}: {reason}' for test, reason in result.skipped])


def run(folder, names):
    """Run test_*.py of a folder, or only some of its tests; exits."""
    sys.path.insert(0, str(folder))
    loader = unittest.TestLoader()
    tests = (loader.loadTestsFromNames(names) if names
             else loader.discover(str(folder), 'test_*.py'))
    if loader.errors:
        sys.exit('\n'.join(loader.errors))
    # Once each, in their order
    found = list(dict.fromkeys(names_in(tests)))
    ran, failed, skipped = 0, 0, []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for said, *counts in pool.map(run_one, found):
            print(said, flush=True)
            ran += counts[0]
            failed += counts[1]
            skipped += counts[2]
    print('\n'.join([*skipped, summary(ran - failed - len(skipped), failed,
                                       len(skipped))]))
    sys.exit(failed > 0 or not ran)

# SPDX-License-Identifier: GPL-2.0-or-later

"""
What is shown during a snapshot, without QEMU.
"""

import contextlib
import io
import unittest

import case  # noqa: F401  (makes the package importable)
from snapshot.progress import Progress


class Bars(unittest.TestCase):
    """query-migrate's answers as a line."""

    def line(self, info, bar=True):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            Progress(False, bar).migration(info)
        return said.getvalue()

    def test_all(self):
        ram = {'total': 1 << 30, 'remaining': 1 << 28,
               'transferred': 700 << 20}
        self.assertRegex(self.line({'ram': ram}),
                         r'\[#{15}\.{5}\]  75%  700 MiB written')
        more = {'buffer': {'size': 1 << 27, 'used': 1 << 20, 'peak': 1 << 21,
                           'waits': 3},
                'stalls': {'count': 12, 'waiting': 0, 'total': 999,
                           'longest': 2500, 'histogram': []}}
        self.assertRegex(
            self.line({'ram': ram, 'background-snapshot': more}),
            r'buffer 1.0 MiB of 128 MiB \(full 3 times\), 12 writes stopped '
            r'\(longest 2.5 ms\)')

    def test_none(self):
        self.assertEqual(self.line({'status': 'setup'}), '')
        self.assertEqual(self.line({'ram': {'total': 1}}, bar=False), '')

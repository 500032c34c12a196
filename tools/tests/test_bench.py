# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures that the benchmarks take from what others print."""

import os
import sys
import tempfile
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import (  # noqa: E402
    cpu, measure, memory, operations, report, rows, ways)
from lab.qmp import ExecuteError  # noqa: E402
from lab.sink import FileSink  # noqa: E402

MIB = 1 << 20
SMAPS = '''\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
Size:               2048 kB
Anonymous:          2048 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac sd hg
7f0000200000-7f0000600000 rw-p 00000000 00:00 0 
AnonHugePages:      4096 kB
ShmemPmdMapped:        8 kB
7f0000600000-7f0000800000 r--p 00000000 00:00 0                  [anon: x]
AnonHugePages:         0 kB
7f0000800000-7f0000c00000 rw-p 00000000 00:00 0 
AnonHugePages:      2048 kB
'''
RAMBLOCK = '''\
              Block Name    PSize              Offset               Used  \
            Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000040000000 \
0x0000000040000000 0x00007f4c47e00000  rw
                 pc.bios    4 KiB  0x0000000040000000 0x0000000000040000 \
0x0000000000040000 0x00007f4c92200000  ro
    /rom@etc/acpi/tables    4 KiB  0x0000000040080000 0x0000000000020000 \
0x0000000000200000 0x00007f4c47a00000  ro
'''


class Memory(unittest.TestCase):
    def test_status(self):
        text = Path('/proc/self/status').read_text()
        self.assertGreater(memory.field(text, 'RssAnon'), MIB)
        self.assertGreater(memory.field(text, 'VmPTE'), 0)
        with self.assertRaises(ValueError):
            memory.field(text, 'NoSuchLine')

    def test_huge_pages_of_an_area(self):
        base = 0x7f0000000000
        for begin, end, mib in ((0, 12, 8), (0, 2, 2), (2, 6, 4), (6, 8, 0),
                                (4, 10, 6), (12, 16, 0)):
            self.assertEqual(
                memory.huge_pages(SMAPS, base + begin * MIB,
                                  base + end * MIB), mib * MIB, (begin, end))

    def test_largest_block(self):
        self.assertEqual(memory.largest_block(RAMBLOCK), (
            0x7f4c47e00000, 0x7f4c47e00000 + 0x40000000))

    def test_watching_a_process(self):
        class Vm:
            """Ourselves"""
            process = type('process', (), {'pid': os.getpid()})
            qmp = type('qmp', (), {'cmd': staticmethod(
                lambda *_, **__: RAMBLOCK)})

        watch = memory.Memory(Vm)
        watch.look('before')
        more = bytearray(os.urandom(1024)) * (32 << 10)
        time.sleep(10 * memory.SAMPLE_S)
        watch.look('after')
        seen = watch.finish()
        self.assertGreater(seen['after']['anonymous'],
                           seen['before']['anonymous'] + len(more) - MIB)
        self.assertGreater(max(s[1] for s in seen['samples']),
                           seen['before']['anonymous'] + len(more) - MIB)


class Operations(unittest.TestCase):
    # 100 a second until 10 s, 50 until 12 s, 200 from then on
    REPORTS = ([(t / 50, 2 * t) for t in range(500)]
               + [(10 + t / 50, 1000 + t) for t in range(100)]
               + [(12 + t / 50, 1100 + 4 * t) for t in range(500)])

    def rates(self, *borders):
        measured = {'reports': self.REPORTS, 'borders': borders}
        return [operations.before(measured), operations.during(measured),
                operations.after(measured, 0, 5),
                operations.after(measured, 5, 10)]

    def test_rates(self):
        for got, expected in zip(self.rates(10, 12), (100, 50, 200)):
            self.assertAlmostEqual(got, expected, delta=1e-6)

    def test_a_border_between_reports_counts_in_proportion(self):
        before, during, after, _ = self.rates(9.99, 12.01)
        self.assertAlmostEqual(before, 100)
        self.assertAlmostEqual(during, (1 + 100 + 2) / 2.02)
        self.assertAlmostEqual(after, 200)

    def test_what_was_not_watched_has_no_rate(self):
        self.assertIsNone(self.rates(4.9, 12)[0])
        self.assertIsNotNone(self.rates(5.1, 12)[0])
        self.assertIsNone(self.rates(10, 12)[3])


def window(seconds, writes, per_100ms):
    """In which all writes were fast."""
    return {'seconds': seconds, 'writes': writes, 'fast': [writes],
            'slow_first_ns': [], 'slow_again_ns': [], 'per_100ms': per_100ms}


class Table(unittest.TestCase):
    def measurement(self, row, **measured):
        look = {'anonymous': 100 * 10**6, 'page_tables': 0,
                'huge': 80 * 10**6}
        return {'row': row, 'variant': 'stock', 'round': 1, 'seconds': 2,
                'how': 'live', 'whole': True, 'freeze_s': 0.001,
                'image_bytes': 2**31, 'page_bytes': 2**31,
                'sink_cpu_s': 0,
                'cpu': {'vcpus_s': 9, 'saving_s': 3, 'others': 0},
                'memory': {'before': look, 'end': dict(look, huge=0),
                           '5_s_after': dict(look, anonymous=107 * 10**6,
                                             huge=60 * 10**6),
                           'samples': [(0, 100 * 10**6, 0),
                                       (1, 140 * 10**6, 5000)]}, **measured}

    def figures(self, measurement):
        """{name: value} of the table's first column."""
        lines = report.table([measurement]).splitlines()
        return {line[2:24].strip(): line[24:48].strip() for line in lines
                if line.startswith('  ')}

    def test_writer(self):
        shown = self.figures(self.measurement(
            'full-fast-file', guest_freeze_s=0.002, windows={
                'before': window(5, 5000, [100] * 50),
                'during': window(2, 500, [25] * 20),
                'after': window(6, 3000, [20] * 10 + [50] * 30 + [90] * 10
                                + [0] * 10)}))
        for name, value in {'speed kept': '25.0%', 'speed, 1 s after': '20.0%',
                            'speed, 5 s after': '90.0%',
                            'speed, 30 s after': '-',
                            'more, peak': '40 MB', 'more, 5 s after': '7 MB',
                            'kept, at the end': '0.0%',
                            'throughput': '1,074 MB/s',
                            'CPU per GiB': '1.5 s',
                            'kept, 5 s after': '75.0%'}.items():
            self.assertEqual(shown.get(name, '-'), value, name)
        self.assertNotIn('operations, during', shown)

    def test_what_query_migrate_tells(self):
        shown = report.table([self.measurement('full-fast-file', figures={
            'freeze': {'total': 9, 'stop': 4, 'arm': 5},
            'trapped-writes': 7, 'stalls': {'longest': 31},
            'buffer': {'waits': 2, 'peak': 3 * 10**6}, 'scanned-pages': 1,
            'write-pages': 2, 'zero-pages': 3, 'untouched-pages': 4,
            'split-huge-pages': 5, 'mended-huge-pages': 6})])
        for part in ('stop 4 us, arm 5 us', '7 writes stopped, the longest '
                     'for 31 us, 2 times', '3 MB were used',
                     'write-pages 2', 'mended-huge-pages 6'):
            self.assertIn(part, shown)

    def test_operations(self):
        shown = self.figures(self.measurement(
            'keyvalue-fast-file', operations={
                'reports': Operations.REPORTS, 'borders': (10, 12)}))
        for name, value in {'operations/s before': '100',
                            'operations, during': '50.0%',
                            'operations, 5 s after': '200.0%'}.items():
            self.assertEqual(shown[name], value)
        self.assertNotIn('speed kept', shown)

    def test_a_guest_that_stands_still_has_no_speed(self):
        shown = self.figures(self.measurement(
            'throughput', how='stopped', guest_freeze_s=2, windows={
                name: window(1, 10, [1] * 10) for name
                in ('before', 'during', 'after')}))
        self.assertEqual(shown['freeze, guest'], '2 s')
        self.assertNotIn('speed kept', shown)

    def test_what_was_cancelled_has_no_throughput(self):
        shown = self.figures(self.measurement('freeze-1g-half', whole=False))
        self.assertEqual(shown['freeze, QMP'], '1 ms')
        self.assertNotIn('throughput', shown)
        self.assertNotIn('snapshot', shown)


class Cpu(unittest.TestCase):
    def test_own_time_is_told_from_that_of_others(self):
        watch = cpu.Cpu(os.getpid())
        began = time.process_time()
        while time.process_time() - began < 0.3:
            pass
        used = watch.used(0)
        self.assertGreater(used['saving_s'], 0.2)
        self.assertEqual(used['vcpus_s'], 0)


class Refusal(ExecuteError):
    """A command's error"""

    def __init__(self):
        Exception.__init__(self)

    def __str__(self):
        return 'not with multifd'


class Ways(unittest.TestCase):
    def test_what_qemu_refuses_is_unavailable_for_its_reason(self):
        class Vm:
            """Refuses everything"""
            class qmp:
                mark = staticmethod(lambda: 0)

                @staticmethod
                def cmd(*_, **__):
                    raise Refusal

        [row] = [r for r in rows.ROWS if r.name == 'throughput']
        for variant in rows.VARIANTS:
            if variant.how != 'dd':
                for way in (ways.configure,
                            lambda *args: ways.save(*args, FileSink(Path()))):
                    with self.assertRaisesRegex(ways.Unavailable,
                                                '^not with multifd$'):
                        way(Vm, row, variant)

    def test_dd_writes_whole_blocks_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            image, source = Path(folder) / 'image', Path(folder) / 'source'
            done = ways.dd(image, 5 * MIB + 1, False, source)
            self.assertEqual(done['image_bytes'], 6 * MIB)
            self.assertEqual(list(Path(folder).iterdir()), [])

    def test_holes_do_not_count(self):
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / 'image'
            self.assertEqual(measure._occupied(FileSink(image)), 0)
            with image.open('wb') as file:
                file.seek(64 * MIB)
                file.write(b'x' * MIB)
            occupied = measure._occupied(FileSink(image))
            self.assertTrue(MIB <= occupied < 2 * MIB, occupied)

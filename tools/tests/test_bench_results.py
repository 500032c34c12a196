# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of the benchmarks' samples: comparisons, tables and plots."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from bench import report, rows, tables  # noqa: E402
from bench.permutation import ALPHA, p_value  # noqa: E402
from lab import env  # noqa: E402

# Small enough for a README.
MOST_BYTES = 100_000
PYTHON = '/usr/bin/python3'
NO_MATPLOTLIB = subprocess.run([PYTHON, '-c', 'import matplotlib'],
                               stderr=subprocess.DEVNULL).returncode


class Permutation(unittest.TestCase):
    def test_exact(self):
        # Of the 70 ways to divide 8 samples, only two are that far apart.
        self.assertAlmostEqual(p_value([1, 2, 3, 4], [5, 6, 7, 8]), 2 / 70)
        self.assertEqual(p_value([1, 2], [1, 2]), 1)
        self.assertEqual(p_value([3.3] * 4, [3.3] * 4), 1)

    def test_too_few_samples_never_show_a_difference(self):
        self.assertGreaterEqual(p_value([1, 1.1, 1.2], [9, 9.1, 9.2]), ALPHA)
        self.assertEqual(p_value([1], [9]), 1)

    def test_at_random(self):
        generator = random.Random(1)
        one, other = ([generator.gauss(mean, 1) for _ in range(20)]
                      for mean in (10, 13))
        self.assertLess(p_value(one, other), 0.001)
        self.assertGreater(p_value(one, other), 0)
        self.assertEqual(p_value(one, other, 5), p_value(one, other, 5))
        self.assertGreater(p_value(one[:10], one[10:]), ALPHA)

    def test_no_difference_is_rarely_called_one(self):
        generator = random.Random(2)
        shown = sum(
            p_value(*([generator.expovariate(1) for _ in range(5)]
                      for _ in range(2))) < ALPHA for _ in range(400))
        self.assertLess(shown, 40)

    def test_ratio_tells_whether_it_is_shown(self):
        self.assertEqual(report.ratio([1, 2, 3, 4], [50, 60, 70, 80]),
                         '(0.038)')
        self.assertEqual(report.ratio([1, 2, 3], [50, 60, 70]), '(~0.033)')
        self.assertEqual(report.ratio([1], [0]), '')


class Rows(unittest.TestCase):
    def test_names_are_unique_and_rows_fit_their_guests(self):
        names = [row.name for row in rows.ROWS]
        self.assertEqual(len(set(names)), len(names))
        for row in rows.ROWS:
            with self.subTest(row.name):
                if isinstance(row.load, rows.Writer):
                    self.assertLess(row.load.area_mb + row.load.fill_mb,
                                    row.ram_mb)
                # All are compared to it.
                self.assertEqual(row.variants[0], rows.STOCK)

    def test_variants_are_what_qemu_can_be_asked_for(self):
        self.assertEqual(len({v.name for v in rows.VARIANTS}),
                         len(rows.VARIANTS))
        for v in rows.VARIANTS:
            with self.subTest(v.name):
                self.assertEqual(v.trap is not None, v.binary == env.QEMU)
                if v.format.channels or v.format.direct and v.how != 'dd':
                    self.assertTrue(v.format.mapped)
                if v.format.direct and v.how != 'dd':
                    self.assertGreater(v.format.channels, 0)


def measurement(row, variant, number):
    """As measure.measure() returns it, made up."""
    generator = random.Random(f'{row.name} {variant.name} {number}')
    factor = (1 + rows.VARIANTS.index(variant)) * generator.uniform(1, 1.1)
    made = {'row': row.name, 'variant': variant.name, 'round': number,
            'how': variant.how, 'whole': row.whole, 'seconds': 9 / factor,
            'image_bytes': 3 * 10**9, 'page_bytes': 3 * 10**9}
    if variant.how == 'dd':
        return made
    look = {'anonymous': 10**9, 'page_tables': 10**6, 'huge': 10**9}

    def window(seconds):
        return {'seconds': seconds, 'writes': 2000 * seconds + 300,
                'fast': [0, 2000 * seconds] + [0] * 28,
                'slow_first_ns': [int(generator.expovariate(1e-5)) + 3000
                                  for _ in range(200)],
                'slow_again_ns': [3500] * 100,
                'per_100ms': [generator.randrange(150, 200)
                              for _ in range(10 * seconds)],
                'longest_ns': [generator.choice((0, 5000, 10**6))
                               for _ in range(100 * seconds)]}
    made.update(
        freeze_s=factor / 1e3, sink_cpu_s=0,
        cpu={'saving_s': 2, 'vcpus_s': 1, 'others': 0.1},
        memory={'before': look, 'end': look, '5_s_after': look,
                'samples': [(0, 10**9, 10**6)]})
    if isinstance(row.load, rows.Writer):
        made.update(guest_freeze_s=factor / 500, windows={
            name: window(seconds) for name, seconds
            in (('before', 3), ('during', 10), ('after', 31))})
    else:
        made['operations'] = {
            'reports': [(t / 10, 5 * t) for t in range(300)],
            'borders': (10, 15)}
    return made


class Results(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.measurements = [
            measurement(row, variant, number) for row in rows.ROWS
            for variant in row.variants for number in range(1, 5)]

    def setUp(self):
        self.root = Path(tempfile.mkdtemp(prefix='bench-'))
        self.addCleanup(shutil.rmtree, self.root)

    def run_of(self, name, measurements):
        path = self.root / f'{name}.json'
        path.write_text(json.dumps({'measurements': measurements}))
        return path

    def test_each_table_has_its_place_in_the_readme(self):
        made = tables.tables(self.measurements)
        self.assertEqual(set(made), {'writes', 'throughput', 'freeze'})
        readme = (ROOT / 'README.md').read_text()
        filled = tables.fill(readme, made)
        self.assertEqual(tables.fill(filled, made), filled)
        for name, text in made.items():
            self.assertIn(text, filled)
            for line in text.splitlines():
                self.assertLessEqual(len(line), 100, line)
        # What is around them stays.
        self.assertEqual(readme.partition('<!-- bench:')[0],
                         filled.partition('<!-- bench:')[0])
        self.assertEqual(readme.rpartition('<!-- /bench -->')[2],
                         filled.rpartition('<!-- /bench -->')[2])

    def test_lines_of_tables(self):
        made = tables.tables([m for m in self.measurements if m['row'] in
                              ('throughput', 'freeze-8g-full')])
        self.assertNotIn('writes', made)
        self.assertRegex(made['throughput'], r'(?m)^\| stock \| [\d.]+ s \|')
        self.assertRegex(made['throughput'],
                         r'(?m)^\| dd-direct \| .* MB/s \([\d.]+\) \| – \|')
        self.assertRegex(made['freeze'], r'(?m)^\| 8g, full \| ')
        self.assertNotIn('1g', made['freeze'])

    def test_a_place_that_is_missing_is_told(self):
        with self.assertRaises(ValueError):
            tables.fill('no place\n', {'writes': 'x'})

    def test_text_has_each_row_and_variant(self):
        text = report.table(self.measurements)
        for row in rows.ROWS:
            self.assertIn(f'{row.name}: {row.what}', text)
        for variant in rows.VARIANTS:
            self.assertIn(f'\n  {variant.name} 4: ', text)

    def test_of_a_row_in_several_runs_the_last_counts(self):
        one, two = ([dict(m, seconds=s) for m in self.measurements
                     if m['row'] in names] for s, names in (
                         (1, ('full-fast-file', 'one-core')),
                         (2, ('one-core',))))
        loaded = report.load([self.run_of('a', one), self.run_of('b', two)])
        self.assertEqual({(m['row'], m['seconds']) for m in loaded},
                         {('full-fast-file', 1), ('one-core', 2)})

    @unittest.skipIf(NO_MATPLOTLIB, 'matplotlib is not installed')
    def test_publish(self):
        readme = self.root / 'README.md'
        shutil.copy(ROOT / 'README.md', readme)
        command = [PYTHON, ROOT / 'bench/publish', '--root', self.root,
                   self.run_of('all', self.measurements)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = self.root / 'bench/results'
        first = {p.name: p.read_bytes()
                 for p in [readme, *results.iterdir()]}
        for name in ('latency', 'distribution', 'speed', 'freeze',
                     'throughput'):
            self.assertIn(f'(bench/results/{name}.svg)', readme.read_text())
            for kind in ('svg', 'png'):
                self.assertLess(len(first[f'{name}.{kind}']), MOST_BYTES)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, content in first.items():
            path = readme if name == 'README.md' else results / name
            self.assertEqual(path.read_bytes(), content, name)

    @unittest.skipIf(NO_MATPLOTLIB, 'matplotlib is not installed')
    def test_plots_of_what_was_measured_only(self):
        some = [m for m in self.measurements if m['row'] == 'freeze-1g-half']
        shown = subprocess.run(
            [PYTHON, ROOT / 'bench/plot', self.root / 'plots',
             self.run_of('some', some)], check=True, text=True,
            stdout=subprocess.PIPE).stdout
        self.assertEqual(shown, f'{self.root}/plots/freeze.svg\n')
        self.assertEqual({p.name for p in (self.root / 'plots').iterdir()},
                         {'freeze.svg', 'freeze.png'})

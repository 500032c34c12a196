"""Turns measurements into tables of text.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import json
from pathlib import Path
from statistics import median
from typing import Dict, List, Sequence

from .figures import FIGURES, Figure, Measurement
from .operations import BEFORE_S
from .permutation import ALPHA, p_value
from .rows import ROWS, STOCK, Row
from .writes import SLOW_NS

NAME_WIDTH, CELL_WIDTH = 22, 24
# More columns than this go below each other.
COLUMNS = 4

EXPLANATION = f'''\
Medians of the rounds' figures, below them the lowest and the highest; in
brackets the ratio to stock.  With ~, no difference is shown: there are too few
rounds, or in a permutation test of the means p is {ALPHA} or more.  (Of {1 / ALPHA:.0f}
comparisons of what is equal, one may well show a difference.)

Unless they say otherwise, figures are of the time of the snapshot and of some
50 ms around it.  A trapped write took {SLOW_NS / 1000:g} us or more and was
the first such to its page; "by chance" is how many there would be at the rate
of the time before.  "Speed kept" is writes a second by those before; "usually":
the median of tenths of a second; "after": in the second that ends then.
Operations are by those of the {BEFORE_S} seconds before, "after" in the five
seconds that end then.  Throughput is bytes of pages, without those of
zeroes, by the time of the snapshot; CPU is what QEMU's threads have used, but
not its vCPUs' (which with some traps copy pages as well).  "Freeze, guest" is
how long the writing program stood still around the stop, by the host's clock,
with an error of up to 1 ms.  RAM of QEMU is anonymous memory of the host,
"more" is above what it was before; huge pages are those of the guest's RAM.
'''


def samples(figure: Figure, measurements: Sequence[Measurement]
            ) -> List[float]:
    return [v for v in map(figure.of, measurements) if v is not None]


def ratio(own: Sequence[float], base: Sequence[float]) -> str:
    """Of the medians, in brackets, with ~ if no difference is shown."""
    if not base or not median(base):
        return ''
    value = median(own) / median(base)
    mark = '' if p_value(own, base) < ALPHA else '~'
    return (f'({mark}{value:.2f})' if value >= 0.1
            else f'({mark}{value:.3f})')


def by_variant(row: Row, measurements: Sequence[Measurement]
               ) -> Dict[str, List[Measurement]]:
    """Those of a row, by the names of the variants that were measured."""
    found = {v.name: [m for m in measurements if m['row'] == row.name
                      and m['variant'] == v.name] for v in row.variants}
    return {name: own for name, own in found.items() if own}


def _line(name: str, cells: List[str], width: int) -> str:
    return (f'  {name:{NAME_WIDTH}}'
            + ''.join(f'{c:>{width}}' for c in cells)).rstrip()


def _figure_lines(figure: Figure, columns: Dict[str, List[Measurement]],
                  stock: List[Measurement], width: int) -> List[str]:
    """One line, and if there are rounds one with the spread, one with p.

    No line if the figure is not for such a row.
    """
    values = [samples(figure, own) for own in columns.values()]
    if not any(values):
        return []
    base = samples(figure, stock) if figure.compared else []
    middles, spreads, ps = [], [], []
    for name, own in zip(columns, values):
        compared = own and base and name != STOCK.name
        middles.append(f'{figure.show(median(own))} '
                       f'{ratio(own, base) if compared else "":>8}'
                       if own else '-')
        spreads.append(f'{figure.show(min(own))} - {figure.show(max(own))}'
                       if own else '')
        ps.append(f'p {p_value(own, base):.3f}' if compared else '')
    lines = [_line(figure.name, middles, width)]
    if max(map(len, values)) > 1:
        lines.append(_line('', spreads, width))
        if any(ps):
            lines.append(_line('', ps, width))
    return lines


def _notes(m: Measurement) -> str:
    """What else is known of one measurement."""
    notes = [f'{m["image_bytes"] / 1e6:.0f} MB']
    if 'cpu' in m:
        notes.append(f'the sink took {m["sink_cpu_s"] / m["seconds"]:.2f} '
                     f'CPUs, other processes {m["cpu"]["others"]:.2f}')
    figures = m.get('figures')
    if figures:
        notes.append('freeze: ' + ', '.join(
            f'{part} {us} us' for part, us
            in figures.get('freeze', {}).items()))
        notes.append(
            f'{figures["trapped-writes"]} writes stopped, the longest for '
            f'{figures["stalls"]["longest"]} us, '
            f'{figures["buffer"]["waits"]} times for room in the buffer, of '
            f'which {figures["buffer"]["peak"] / 1e6:.0f} MB were used')
        notes.append(', '.join(f'{name} {figures[name]}' for name in (
            'scanned-pages', 'write-pages', 'zero-pages', 'untouched-pages',
            'split-huge-pages', 'mended-huge-pages')))
    return '; '.join(notes)


def _row_lines(row: Row, measurements: Sequence[Measurement]) -> List[str]:
    columns = by_variant(row, measurements)
    if not columns:
        return []
    lines = [f'{row.name}: {row.what}', '']
    names = list(columns)
    for at in range(0, len(names), COLUMNS):
        some = {name: columns[name] for name in names[at:at + COLUMNS]}
        width = max(CELL_WIDTH, *(len(name) + 2 for name in some))
        lines.append(_line('', list(some), width))
        for figure in FIGURES:
            lines += _figure_lines(figure, some, columns.get(STOCK.name, []),
                                   width)
        lines.append('')
    lines += [f'  {m["variant"]} {m["round"]}: {_notes(m)}'
              for own in columns.values() for m in own]
    return lines + ['']


def table(measurements: Sequence[Measurement]) -> str:
    """A table for each row."""
    return '\n'.join([EXPLANATION] + [line for row in ROWS for line
                                      in _row_lines(row, measurements)])


def load(paths: Sequence[Path]) -> List[Measurement]:
    """What runs have measured; of a row that is in several, the last."""
    runs = [json.loads(path.read_text())['measurements'] for path in paths]
    last = {m['row']: run for run in runs for m in run}
    return [m for run in runs for m in run if last[m['row']] is run]

"""Turns measurements into tables.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from statistics import median
from typing import List

from .figures import FIGURES, Figure, Measurement
from .operations import BEFORE_S
from .rows import ROWS, STOCK, VARIANTS, Row
from .writes import SLOW_NS

NAME_WIDTH = 22
CELL_WIDTH = 21

EXPLANATION = f'''\
Medians of the rounds' figures, below them the lowest and the highest; in
brackets the ratio to stock.

Unless they say otherwise, figures are of the time of the snapshot and of some
50 ms around it.  A trapped write took {SLOW_NS / 1000:g} us or more and was
the first such to its page; "by chance" is how many there would be at the rate
of the time before.  "Speed kept" is writes a second by those before; "usually":
the median of tenths of a second; "after": in the second that ends then.
Operations are by those of the {BEFORE_S} seconds before, "after" in the five
seconds that end then.  "Freeze, guest" is how long the writing program stood
still around the stop, by the host's clock, with an error of up to 1 ms.  RAM of
QEMU is anonymous memory of the host, "more" is above what it was before; huge
pages are those of the guest's RAM.
'''


def _ratio(value: float, base: float) -> str:
    ratio = value / base
    return f'({ratio:.2f})' if ratio >= 0.1 else f'({ratio:.3f})'


def _line(name: str, cells: List[str]) -> str:
    return (f'  {name:{NAME_WIDTH}}'
            + ''.join(f'{c:>{CELL_WIDTH}}' for c in cells)).rstrip()


def _figure_lines(figure: Figure, columns: List[List[Measurement]]
                  ) -> List[str]:
    """One line, and one with the spread if there are rounds.

    No line if the figure is not for such a row.
    """
    values = [[v for v in map(figure.of, column) if v is not None]
              for column in columns]
    if not any(values):
        return []
    base = next((median(own) for column, own in zip(columns, values)
                 if own and column[0]['variant'] == STOCK.name), None)
    middles, spreads = [], []
    for column, own in zip(columns, values):
        if not own:
            middles.append('-')
            spreads.append('')
            continue
        ratio = (_ratio(median(own), base) if base and figure.compared
                 and column[0]['variant'] != STOCK.name else '')
        middles.append(f'{figure.show(median(own))} {ratio:>8}')
        spreads.append(f'{figure.show(min(own))} - {figure.show(max(own))}')
    lines = [_line(figure.name, middles)]
    if max(map(len, values)) > 1:
        lines.append(_line('', spreads))
    return lines


def _row_lines(row: Row, measurements: List[Measurement]) -> List[str]:
    columns = [own for own in
               ([m for m in measurements if m['variant'] == v.name]
                for v in VARIANTS) if own]
    lines = [f'{row.name}: {row.what}', '',
             _line('', [f'{own[0]["variant"]}{"":9}' for own in columns])]
    for figure in FIGURES:
        lines += _figure_lines(figure, columns)
    lines.append('')
    for m in measurements:
        lines.append(f'  {m["variant"]} {m["round"]}: '
                     f'{m["image_bytes"] / 1e6:.0f} MB, the sink took '
                     f'{m["sink_cpu_s"] / m["seconds"]:.2f} CPUs, other '
                     f'processes {m["other_cpus"]:.2f}; '
                     f'{m["totals"]}'.rstrip('; '))
    return lines + ['']


def table(measurements: List[Measurement]) -> str:
    """A table for each row."""
    lines = [EXPLANATION]
    for row in ROWS:
        own = [m for m in measurements if m['row'] == row.name]
        if own:
            lines += _row_lines(row, own)
    return '\n'.join(lines)

"""Turns measurements into a table.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from typing import Any, Dict, List

from .rows import ROWS, VARIANTS, Row

Measurement = Dict[str, Any]
QUANTILES = ((0.5, 'p50'), (0.99, 'p99'), (0.999, 'p99.9'), (1.0, 'max'))


def quantile(ordered: List[int], q: float) -> float:
    """The value that the part @q of the sorted values does not exceed."""
    index = max(0, -int(-len(ordered) * q // 1) - 1)
    return ordered[index]


def show_ns(ns: float) -> str:
    for unit, size in (('s', 1e9), ('ms', 1e6), ('us', 1e3)):
        if ns >= size:
            return f'{ns / size:.3g} {unit}'
    return f'{ns:.0f} ns'


def _pooled(measurements: List[Measurement], window: str) -> List[int]:
    return sorted(ns for m in measurements
                  for ns in m['windows'][window]['samples_ns'])


def _rate(measurements: List[Measurement], window: str) -> float:
    windows = [m['windows'][window] for m in measurements]
    return (sum(w['writes'] for w in windows)
            / sum(w['seconds'] for w in windows))


def _span(values: List[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f'{low} - {high}'


def _row_table(row: Row, measurements: List[Measurement]) -> List[str]:
    head = ''.join(f'{name:>10}' for _, name in QUANTILES)
    lines = [f'{row.name}: {row.what}', '',
             f'  {"single writes":22}{head}{"samples":>10}{"writes/s":>12}']
    for window in ('before', 'during', 'after'):
        for variant in VARIANTS:
            own = [m for m in measurements if m['variant'] == variant.name]
            samples = _pooled(own, window)
            if not samples:
                lines.append(f'  {window:8}{variant.name:14}  no samples')
                continue
            cells = ''.join(f'{show_ns(quantile(samples, q)):>10}'
                            for q, _ in QUANTILES)
            lines.append(f'  {window:8}{variant.name:14}{cells}'
                         f'{len(samples):10}{_rate(own, window):12,.0f}')
    lines.append('')
    for variant in VARIANTS:
        own = [m for m in measurements if m['variant'] == variant.name]
        tails = [quantile(_pooled([m], 'during'), 0.999) / 1e6 for m in own
                 if m['windows']['during']['samples_ns']]
        if not own or not tails:
            continue
        lines.append(
            f'  {variant.name:8} {len(own)} rounds: snapshot '
            + _span([m['seconds'] for m in own], '{:.1f}') + ' s, freeze '
            + _span([m['freeze_s'] * 1e3 for m in own], '{:.1f}')
            + ' ms, image '
            + _span([m['image_bytes'] / 1e6 for m in own], '{:.0f}')
            + ' MB, p99.9 by round ' + _span(tails, '{:.3f}') + ' ms,'
            ' other processes took ' + _span([m['other_cpus'] for m in own],
                                             '{:.2f}') + ' CPUs')
        lines += [f'    round {m["round"]}: {m["totals"]}' for m in own
                  if m['totals']]
    return lines + ['']


def table(measurements: List[Measurement]) -> str:
    """Quantiles of all rounds' samples together, per row and variant."""
    lines: List[str] = []
    for row in ROWS:
        own = [m for m in measurements if m['row'] == row.name]
        if own:
            lines += _row_table(row, own)
    return '\n'.join(lines)

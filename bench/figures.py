"""The figures that are shown of a measurement.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional

from . import writes

Measurement = Dict[str, Any]


@dataclass
class Figure:
    """of: its value, None if there is none; show: how it is printed."""
    name: str
    of: Callable[[Measurement], Optional[float]]
    show: Callable[[float], str]


def _time(ns: float) -> str:
    for unit, size in (('s', 1e9), ('ms', 1e6), ('us', 1e3)):
        if ns >= size:
            return f'{ns / size:.3g} {unit}'
    return f'{ns:.0f} ns'


def _all_writes(q: float, m: Measurement) -> float:
    return writes.quantile_all(m['windows']['during'], q)


def _trapped(q: float, m: Measurement) -> Optional[float]:
    ordered = writes.trapped(m['windows']['during'])
    return writes.quantile(ordered, q) if ordered else None


def _by_chance(m: Measurement) -> float:
    before, during = m['windows']['before'], m['windows']['during']
    return (len(writes.trapped(before)) / before['seconds']
            * during['seconds'])


def _kept(rate: Callable[[writes.Window], float], m: Measurement
          ) -> Optional[float]:
    before = rate(m['windows']['before'])
    return rate(m['windows']['during']) / before if before else None


def _quantiles(name: str, of: Callable[[float, Measurement], Optional[float]]
               ) -> List[Figure]:
    return [Figure(f'{name}, {label}', partial(of, q), _time)
            for label, q in (('p50', 0.5), ('p99', 0.99), ('p99.9', 0.999),
                             ('max', 1.0))]


FIGURES = [
    *_quantiles('all writes', _all_writes),
    *_quantiles('trapped writes', _trapped),
    Figure('trapped writes, sum',
           lambda m: sum(writes.trapped(m['windows']['during'])), _time),
    Figure('trapped writes', lambda m: len(
        writes.trapped(m['windows']['during'])), '{:,.0f}'.format),
    Figure('of them by chance', _by_chance, '{:,.0f}'.format),
    Figure('speed kept', partial(_kept, writes.rate), '{:.1%}'.format),
    Figure('speed kept, usually', partial(_kept, writes.usual_rate),
           '{:.1%}'.format),
    Figure('snapshot', lambda m: m['seconds'] * 1e9, _time),
    Figure('freeze, QMP', lambda m: m['freeze_s'] * 1e9, _time),
    Figure('freeze, guest', lambda m: m['guest_freeze_s'] * 1e9, _time),
]

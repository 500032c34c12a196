"""The figures that are shown of a measurement.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional

from . import operations, writes

Measurement = Dict[str, Any]
Value = Callable[[Measurement], Optional[float]]


@dataclass
class Figure:
    """of: its value, None if there is none; show: how it is printed.

    compared: whether its ratio to stock says anything.
    """
    name: str
    of: Value
    show: Callable[[float], str]
    compared: bool = True


def _time(ns: float) -> str:
    for unit, size in (('s', 1e9), ('ms', 1e6), ('us', 1e3)):
        if ns >= size:
            return f'{ns / size:.3g} {unit}'
    return f'{ns:.0f} ns'


def _size(bytes_: float) -> str:
    return f'{bytes_ / 1e6:.4g} MB'


def _rate(bytes_s: float) -> str:
    return f'{bytes_s / 1e6:,.0f} MB/s'


def _with(key: str, of: Value) -> Value:
    """What only measurements have that have @key."""
    return lambda m: of(m) if m.get(key) else None


def _of_windows(of: Value) -> Value:
    """What only a guest has that times its writes, and runs meanwhile."""
    return lambda m: (of(m) if 'windows' in m and m['how'] == 'live'
                      else None)


_of_memory = partial(_with, 'memory')
# What only a snapshot has that was not cancelled.
_of_whole = partial(_with, 'whole')


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


def _kept_after(seconds: int, m: Measurement) -> Optional[float]:
    """In the second that ends @seconds after the snapshot."""
    before = writes.rate(m['windows']['before'])
    tenths = m['windows']['after']['per_100ms'][:seconds * 10][-10:]
    watched = len(m['windows']['after']['per_100ms']) >= seconds * 10
    return sum(tenths) / before if watched and before else None


def _operations_kept(of: Callable[[Dict[str, Any]], Optional[float]],
                     m: Measurement) -> Optional[float]:
    rate, before = of(m['operations']), operations.before(m['operations'])
    return rate / before if before and rate is not None else None


def _growth(look: str, m: Measurement) -> Optional[float]:
    """Of anonymous memory, since before the snapshot."""
    memory = m['memory']
    if look not in memory:
        return None
    return memory[look]['anonymous'] - memory['before']['anonymous']


def _peak(sample: int, name: str, m: Measurement) -> float:
    """The highest sample, above what it was before the snapshot."""
    return (max(s[sample] for s in m['memory']['samples'])
            - m['memory']['before'][name])


def _huge(look: str, m: Measurement) -> Optional[float]:
    before = m['memory']['before']['huge']
    if look not in m['memory'] or not before:
        return None
    return m['memory'][look]['huge'] / before


def _per_gib(m: Measurement) -> float:
    """CPU time of QEMU, its vCPUs' not counted, for each GiB of pages."""
    return m['cpu']['saving_s'] * 1e9 / (m['page_bytes'] / 2**30)


def _quantiles(name: str, of: Callable[[float, Measurement], Optional[float]]
               ) -> List[Figure]:
    return [Figure(f'{name}, {label}', _of_windows(partial(of, q)), _time)
            for label, q in (('p50', 0.5), ('p99', 0.99), ('p99.9', 0.999),
                             ('max', 1.0))]


LOOKS = (('at the end', 'end'), ('5 s after', '5_s_after'),
         ('30 s after', '30_s_after'))
_percent = '{:.1%}'.format
_count = '{:,.0f}'.format

FIGURES = [
    *_quantiles('all writes', _all_writes),
    *_quantiles('trapped writes', _trapped),
    Figure('trapped writes, sum', _of_windows(
        lambda m: sum(writes.trapped(m['windows']['during']))), _time),
    Figure('trapped writes', _of_windows(
        lambda m: len(writes.trapped(m['windows']['during']))), _count),
    Figure('of them by chance', _of_windows(_by_chance), _count, False),
    Figure('speed kept', _of_windows(partial(_kept, writes.rate)), _percent),
    Figure('speed kept, usually', _of_windows(
        partial(_kept, writes.usual_rate)), _percent),
    *[Figure(f'speed, {s} s after', _of_windows(partial(_kept_after, s)),
             _percent) for s in (1, 5, 30)],
    Figure('operations/s before', _with(
        'operations', lambda m: operations.before(m['operations'])), _count),
    *[Figure(f'operations, {name}', _with(
        'operations', partial(_operations_kept, of)), _percent)
      for name, of in (
          ('during', operations.during),
          ('5 s after', partial(operations.after, since=0, until=5)),
          ('10 s after', partial(operations.after, since=5, until=10)))],
    Figure('snapshot', _of_whole(lambda m: m['seconds'] * 1e9), _time),
    Figure('throughput', _of_whole(
        lambda m: m['page_bytes'] / m['seconds']), _rate),
    Figure('CPU per GiB', _of_whole(_with('cpu', _per_gib)), _time),
    Figure('freeze, QMP', _with(
        'freeze_s', lambda m: m['freeze_s'] * 1e9), _time),
    Figure('freeze, guest', _with(
        'guest_freeze_s', lambda m: m['guest_freeze_s'] * 1e9), _time),
    Figure('RAM of QEMU before', _of_memory(
        lambda m: m['memory']['before']['anonymous']), _size),
    Figure('  more, peak', _of_memory(partial(_peak, 1, 'anonymous')), _size,
           False),
    *[Figure(f'  more, {name}', _of_memory(partial(_growth, look)), _size,
             False) for name, look in LOOKS],
    Figure('  page tables, peak', _of_memory(
        partial(_peak, 2, 'page_tables')), _size, False),
    Figure('huge pages before', _of_memory(
        lambda m: m['memory']['before']['huge']), _size),
    *[Figure(f'  kept, {name}', _of_memory(partial(_huge, look)), _percent,
             False) for name, look in LOOKS],
]
BY_NAME = {figure.name.strip(): figure for figure in FIGURES}

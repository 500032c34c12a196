"""The writes that a guest has timed: what wlat.c prints, and quantiles of it.

A window is a dict: seconds, writes, fast (how many writes took 0 to 99 ns,
100 to 199 ns, ...), slow_first_ns (each slow write that was the first slow one
to its page) and slow_again_ns (each other slow write), per_100ms (how many),
longest_ns (of each 10 ms; 0 if there was none).  All writes are in exactly one
of fast, slow_first_ns and slow_again_ns.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from statistics import median
from typing import Any, Dict, List, Sequence

WINDOWS = ('before', 'during', 'after')
KEYS = {'h': 'fast', 'f': 'slow_first_ns', 'a': 'slow_again_ns',
        'r': 'per_100ms', 'm': 'longest_ns'}
# As in wlat.c
BUCKET_NS = 100
SLOW_NS = 3000

Window = Dict[str, Any]


def parse(lines: Sequence[str]) -> Dict[str, Window]:
    """The windows by name; raises RuntimeError if a number got lost."""
    windows: Dict[str, Window] = {}
    expected: Dict[str, List[int]] = {}
    name = ''
    for line in lines:
        words = line.split()
        if words[:2] == ['wlat', 'n']:
            name = WINDOWS[int(words[2])]
            windows[name] = {'seconds': float(words[3]),
                             'writes': int(words[4]),
                             **{key: [] for key in KEYS.values()}}
            expected[name] = [int(w) for w in words[5:]]
        elif words[:1] == ['wlat'] and words[1] in KEYS:
            windows[name][KEYS[words[1]]] += map(int, words[2:])
    if tuple(windows) != WINDOWS:
        raise RuntimeError(f'windows {list(windows)} instead of {WINDOWS}')
    for name, window in windows.items():
        got = [len(window['slow_first_ns']), len(window['slow_again_ns'])]
        if (got != expected[name]
                or sum(got) + sum(window['fast']) != window['writes']):
            raise RuntimeError(f'of {window["writes"]} writes in the window '
                               f'{name}, the guest counted {expected[name]} '
                               f'as slow, and {got} arrived')
    return windows


def rate(window: Window) -> float:
    """Writes a second."""
    return window['writes'] / window['seconds']


def usual_rate(window: Window) -> float:
    """Writes a second, in half of the window's tenths of a second."""
    return median(window['per_100ms'] or [0]) * 10


def trapped(window: Window) -> List[int]:
    """Sorted times of the writes that a trap may have stopped."""
    return sorted(window['slow_first_ns'])


def _place(count: int, q: float) -> int:
    return max(0, -int(-count * q // 1) - 1)


def quantile(ordered: Sequence[int], q: float) -> float:
    """The value that the part @q of sorted values does not exceed."""
    return ordered[_place(len(ordered), q)]


def quantile_all(window: Window, q: float) -> float:
    """Of all writes of a window, in ns; if fast, its bucket's middle."""
    place = _place(window['writes'], q)
    for bucket, count in enumerate(window['fast']):
        if place < count:
            return (bucket + 0.5) * BUCKET_NS
        place -= count
    return sorted(window['slow_first_ns'] + window['slow_again_ns'])[place]

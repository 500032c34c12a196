"""Operations a second, from what a guest reports (see loads.py).

SPDX-License-Identifier: GPL-2.0-or-later
"""
from bisect import bisect_right
from typing import Any, Dict, Optional

BEFORE_S = 5


def _done(operations: Dict[str, Any], when: float) -> float:
    """How many were done at a time, between two reports in proportion."""
    reports = operations['reports']
    at = bisect_right(reports, when, key=lambda r: r[0])
    (t1, n1), (t2, n2) = reports[at - 1], reports[at]
    return n1 + (n2 - n1) * (when - t1) / (t2 - t1)


def rate(operations: Dict[str, Any], begin: float, end: float
         ) -> Optional[float]:
    """Operations a second between two times; None if it was not watched."""
    reports = operations['reports']
    if begin < reports[0][0] or end >= reports[-1][0]:
        return None
    return ((_done(operations, end) - _done(operations, begin))
            / (end - begin))


def before(operations: Dict[str, Any]) -> Optional[float]:
    began = operations['borders'][0]
    return rate(operations, began - BEFORE_S, began)


def during(operations: Dict[str, Any]) -> Optional[float]:
    return rate(operations, *operations['borders'])


def after(operations: Dict[str, Any], since: float, until: float
          ) -> Optional[float]:
    """Between two numbers of seconds after the snapshot."""
    ended = operations['borders'][1]
    return rate(operations, ended + since, ended + until)

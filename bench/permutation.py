"""Whether two sets of samples differ by more than chance would have it.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import random
from itertools import combinations
from math import comb
from typing import Iterator, Sequence, Tuple

ALPHA = 0.05
# Up to so many ways to divide the samples, all are looked at; of more, so many.
MOST_WAYS = 20000


def p_value(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """How probable a difference of means as large as that of @a and @b is.

    If it did not matter which samples are whose, each way to divide all of
    them would be as probable as the one that was measured: this is the part of
    the ways whose means differ at least as much.  With three samples of each,
    it is 0.1 or more: none is ever below ALPHA.
    """
    pool = [*a, *b]
    total = sum(pool)

    def difference(some: Sequence[int]) -> float:
        own = sum(pool[i] for i in some)
        return abs(own / len(a) - (total - own) / len(b))

    # Sums in another order may differ in their last bits.
    measured = difference(range(len(a))) - 1e-9 * max(map(abs, pool))
    if comb(len(pool), len(a)) <= MOST_WAYS:
        every = [difference(some) >= measured
                 for some in combinations(range(len(pool)), len(a))]
        return sum(every) / len(every)
    as_far = sum(difference(some) >= measured
                 for some in _at_random(len(pool), len(a), seed))
    # What was measured is one of the ways: never 0.
    return (as_far + 1) / (MOST_WAYS + 1)


def _at_random(count: int, part: int, seed: int) -> Iterator[Tuple[int, ...]]:
    generator = random.Random(seed)
    for _ in range(MOST_WAYS):
        yield tuple(generator.sample(range(count), part))

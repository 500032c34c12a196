"""All end-to-end cases.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from . import (bad_input, changing, choice, failing, lifecycle, memory,
               roundtrip, scattered, sensitivity, traps)

ALL = (sensitivity.CASES + roundtrip.CASES + traps.CASES + scattered.CASES
       + memory.CASES + changing.CASES + choice.CASES + lifecycle.CASES
       + failing.CASES + bad_input.CASES)

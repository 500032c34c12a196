"""All end-to-end cases.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from . import bad_input, failing, lifecycle, roundtrip, sensitivity

ALL = (sensitivity.CASES + roundtrip.CASES + lifecycle.CASES + failing.CASES
       + bad_input.CASES)

"""Guests, snapshots and restores for the tests, the demo and the benchmarks.

SPDX-License-Identifier: GPL-2.0-or-later
"""

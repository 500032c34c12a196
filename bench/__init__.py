"""Measurements against unmodified QEMU, side by side in one run.

SPDX-License-Identifier: GPL-2.0-or-later
"""

"""Tests with KVM: a host with a patched Linux, in a TCG guest.

SPDX-License-Identifier: GPL-2.0-or-later
"""

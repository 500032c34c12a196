"""The host for tests with KVM: Debian's Linux in a TCG guest.

SPDX-License-Identifier: GPL-2.0-or-later
"""

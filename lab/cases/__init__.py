"""All end-to-end cases.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from typing import Dict, Tuple

from ..scene import Case
from . import (changing, choice, command, failing, faults, formats, hotplug,
               kvm, libvirt, libvirt_killed, libvirt_meanwhile, libvirt_system,
               libvirt_undo, lifecycle, memory, operating, own_writes,
               roundtrip, scattered, sensitivity)

# By name: the host ('': this machine) and the case.  Those for a host are
# called <host>/<case>.
ALL: Dict[str, Tuple[str, Case]] = {
    f'{host}/{case.name}' if host else case.name: (host, case)
    for module in (sensitivity, roundtrip, formats, scattered, memory,
                   changing, hotplug, choice, lifecycle, failing, operating,
                   faults, command, libvirt, libvirt_killed,
                   libvirt_meanwhile, libvirt_undo, libvirt_system, kvm,
                   own_writes)
    for case in module.CASES for host in case.hosts or ('',)}

# SPDX-License-Identifier: GPL-2.0-or-later

"""
Saving and loading RAM and devices: capabilities and parameters, which are as
before afterwards, and the migration itself.
"""

import time
from typing import Any, Callable, Dict, List, NamedTuple

from .errors import SnapshotError
from .vm import VM


Json = Dict[str, Any]

FINAL = ('completed', 'failed', 'cancelled')
POLL_S = 0.25
CANCEL_S = 60


class Format(NamedTuple):
    """How RAM stands in an image, and how it gets there."""
    mapped: bool = False
    channels: int = 0
    direct: bool = False

    def capabilities(self) -> Dict[str, bool]:
        """What source and destination have to agree on."""
        return {'events': True, 'mapped-ram': self.mapped,
                'multifd': bool(self.channels)}

    def parameters(self) -> Json:
        """The same for parameters."""
        parameters: Json = {}
        if self.channels:
            parameters['multifd-channels'] = self.channels
        if self.direct:
            parameters['direct-io'] = True
        return parameters


def running(vm: VM) -> bool:
    """Whether there is a migration now."""
    return vm.cmd('query-migrate').get('status', 'none') not in (
        'none', *FINAL)


def settings(vm: VM, capabilities: Dict[str, bool],
             parameters: Json) -> Json:
    """What the VM has now of what is to be changed."""
    now = {c['capability']: c['state']
           for c in vm.cmd('query-migrate-capabilities')}
    values = vm.cmd('query-migrate-parameters')
    return {'capabilities': {name: now[name] for name in capabilities
                             if name in now},
            'parameters': {name: values[name] for name in parameters
                           if name in values}}


def apply(vm: VM, changed: Json) -> None:
    """Set capabilities and parameters, as settings() returns them."""
    vm.cmd('migrate-set-capabilities', capabilities=[
        {'capability': name, 'state': state}
        for name, state in changed['capabilities'].items()])
    if changed['parameters']:
        vm.cmd('migrate-set-parameters', **changed['parameters'])


def wait(vm: VM, meanwhile: Callable[[Json], None],
         goal: str = 'completed') -> Json:
    """Wait for a state of the migration; raise if it has ended otherwise."""
    while True:
        info: Json = vm.cmd('query-migrate')
        if info.get('status') in (*FINAL, goal):
            break
        meanwhile(info)
        vm.wait_event(POLL_S)
    if info['status'] != goal:
        raise SnapshotError(info.get('error-desc')
                            or f'the migration was {info["status"]}')
    return info


def cancel(vm: VM) -> None:
    """End the migration, if there is one, and wait until it has ended."""
    deadline = time.monotonic() + CANCEL_S
    if running(vm):
        vm.cmd('migrate_cancel')
    while running(vm):
        if time.monotonic() > deadline:
            raise SnapshotError('the migration does not end')
        time.sleep(0.05)


def pause_seconds(events: List[Json]) -> float:
    """From the first STOP to the RESUME after it."""
    began = None
    for event in events:
        stamp = event['timestamp']
        now = stamp['seconds'] + stamp['microseconds'] / 1e6
        if event['event'] == 'STOP' and began is None:
            began = now
        elif event['event'] == 'RESUME' and began is not None:
            return float(now - began)
    return 0.0

# SPDX-License-Identifier: GPL-2.0-or-later

"""
The parts of scripts/qemu-snapshot.  Each module imports only from those
above it in this list:

errors, signals   how a command ends
store, images     directories of snapshots; qemu-img and QEMU's stream reader
vm, blockjobs     a QMP connection; jobs of the block layer
disks, migration  steps of a snapshot: disks, RAM
progress          what is shown meanwhile
undo              takes an unfinished snapshot back
create, delete, verify, cmdline, restore
                  the commands
texts, show, cli  help, results, arguments and the end of the program
"""

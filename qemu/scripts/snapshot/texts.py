# SPDX-License-Identifier: GPL-2.0-or-later

"""
What --help says.  It teaches the workflow, not only the options.
"""

ABOUT = '''\
Take a snapshot of a running VM, RAM and disks of one moment, while the VM
goes on; and restore it.

  qemu-system-x86_64 ... -qmp unix:/run/vm.qmp,server=on,wait=off

  qemu-snapshot create  /backup/vm/monday --qmp /run/vm.qmp
  qemu-snapshot list    /backup/vm
  qemu-snapshot verify  /backup/vm/monday
  qemu-snapshot restore /backup/vm/monday --qmp /run/restored.qmp
  qemu-snapshot delete  /backup/vm/monday --qmp /run/vm.qmp
'''

MORE = '''\
what is created:
  /backup/vm/monday/ram            RAM and devices: a migration stream
  /backup/vm/monday/manifest.json  all that is needed to restore it
  disk.monday.qcow2                an overlay beside each disk of the VM

  The VM writes to the overlays from then on.  The files that it had written
  to before are the snapshot's disks: DO NOT WRITE TO THEM.  If the VM is shut
  down and started again, it has to be started with the overlays as its
  disks, which "create" and "list" name, or the snapshot be deleted first.
  Keep all snapshots of a VM in one directory.

exit codes:
  0    it is done ("verify": the snapshot is good)
  1    it failed, and what it had done is undone
       ("verify": the snapshot is not good)
  2    it was refused: nothing was changed
  3    it failed, and something is left to do by hand; it says what
  130  it was interrupted (SIGINT, SIGTERM, SIGHUP), and is undone

"qemu-snapshot COMMAND --help" tells more of each.
'''

CREATE = '''\
Take a snapshot of a running VM.  This is what happens, over QMP; by hand it
would be the same:

  1. All that could fail is checked; then an overlay is created for each disk.
  2. migrate, with the capabilities background-snapshot and
     pause-before-switchover, which were turned on before: QEMU gets ready, and
     the VM stands still.
  3. transaction: the VM's disks get their overlays, all at one moment.
  4. migrate-continue: QEMU saves the devices, THE VM RESUMES BY ITSELF, and
     RAM is written while it runs.  The VM has stood still for some
     milliseconds.
  5. The migration has completed.  The image is synced to the disk, its
     checksum is taken, and .NAME.partial/ becomes NAME/.

If anything fails, or on SIGINT, it is all undone: the VM runs on, its
overlays are merged back into its disks, and capabilities and parameters of
migrations are as before.  If this program itself is killed, it leaves
.NAME.partial/, which is no snapshot; "delete --partial" undoes it.
'''

CREATE_MORE = '''\
A VM that was paused by somebody else, perhaps to snapshot its disks by other
means (--disks none), is refused unless --paused says that it may be resumed.

QEMU itself opens image and overlays, so it must be allowed to write there.
The image has to be on this host, unless --uri says otherwise.  Overlays may
be read by whom the disk may be.

examples:
  qemu-snapshot create /backup/vm/monday --qmp /run/vm.qmp
  # a large VM: four threads, past the page cache
  qemu-snapshot create /backup/vm/monday --qmp /run/vm.qmp \\
      --format mapped-ram --channels 4 --direct-io
  # its disks are snapshotted by other means, such as LVM, after "stop"
  qemu-snapshot create /backup/vm/monday --qmp /run/vm.qmp \\
      --disks none --paused
'''

RESTORE = '''\
Start a VM from a snapshot.  It gets the command line that the VM was started
with, but

  - its disks are new, empty overlays on the snapshot's disks, so that the
    snapshot can be restored any number of times (with internal snapshots:
    copies, for which the VM must be off);
  - its monitors (-qmp, -monitor, -mon), -pidfile, -daemonize, -S, -loadvm
    and -incoming are left out;
  - the machine type is the very one of the snapshot (-machine type=...);
  - --qmp is its new monitor;
  - -incoming defer and migrate-incoming load RAM and devices.

Arguments after -- are appended: QEMU takes the last of several in most cases.
--print only shows the command.  Any QEMU of the same release restores it.
'''

RESTORE_MORE = '''\
Disks are found in -drive, -blockdev, -hda and the like; a command line where
a disk is named elsewhere, or that has file descriptors in it, as libvirt's,
cannot be used: give a whole one with --command.  If the first VM still runs,
take care that both do not use the same network addresses.  RAM in a file
(memory-backend-file, share=on) needs another file, by --replace.

examples:
  qemu-snapshot restore /backup/vm/monday --qmp /run/r.qmp
  qemu-snapshot restore /backup/vm/monday --qmp /run/r.qmp --paused \\
      -- -display vnc=:7
  qemu-snapshot restore /backup/vm/monday --qmp /run/r.qmp \\
      --replace unix:/run/serial,server null
'''

DELETE = '''\
Delete a snapshot, and merge the overlays that it has cost back into the disks
below: the newest snapshot's, which the VM writes to, as well as those between
two snapshots.  With --qmp if the VM is running, without if it is off.  The
disks that later snapshots name are corrected.  VMs that were restored from
the snapshot have to be gone, with their overlays.

One whose disk was written to since it was taken, and a copy of one, can be
deleted only with --forget; the former before those that were taken earlier,
as otherwise its disk would seem to be good.

Deleting that was interrupted goes on if it is called again; until then, start
the VM only with the disks that it had last.  What cannot be told is left to
you: if QEMU was told to change over to the disk below, and has ended since, or
a VM was started on an overlay after it had been merged, it may not be known
which of both is newer.  --forget deletes only RAM and manifest, and leaves
disks and overlays as they are.
'''

VERIFY = '''\
Check a snapshot without starting a VM: the manifest; size, header and
checksum of the image; whether QEMU's own scripts/analyze-migration.py can
read it (with mapped-ram, only whether its end is there); whether the disks
are there, unchanged since, and sound (qemu-img check).
'''

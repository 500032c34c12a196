/*
 * qemu_snapshot_undo.h: undo external snapshots that were not completed
 *
 * Copyright (C) 2026 the background-snapshot authors
 *
 * This library is free software; you can redistribute it and/or
 * modify it under the terms of the GNU Lesser General Public
 * License as published by the Free Software Foundation; either
 * version 2.1 of the License, or (at your option) any later version.
 *
 * This library is distributed in the hope that it will be useful,
 * but WITHOUT ANY WARRANTY; without even the implied warranty of
 * MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the GNU
 * Lesser General Public License for more details.
 *
 * You should have received a copy of the GNU Lesser General Public
 * License along with this library.  If not, see
 * <http://www.gnu.org/licenses/>.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */

#pragma once

#include "qemu_domain.h"

/* An undo cannot be aborted. */
#define QEMU_SNAPSHOT_UNDO_JOB_MASK (JOB_MASK(VIR_JOB_QUERY) | \
                                     JOB_MASK(VIR_JOB_DESTROY))

int
qemuSnapshotUndoRemember(virQEMUDriver *driver,
                         virDomainObj *vm,
                         virDomainSnapshotDef *snapdef,
                         bool reuse);

void
qemuSnapshotUndoForget(virQEMUDriver *driver,
                       virDomainObj *vm);

void
qemuSnapshotUndoDrop(virDomainObj *vm);

int
qemuSnapshotUndo(virQEMUDriver *driver,
                 virDomainObj *vm);

void
qemuSnapshotUndoEnd(virQEMUDriver *driver,
                    virDomainObj *vm,
                    virDomainSnapshotDef *snapdef,
                    int result);

int
qemuSnapshotUndoResume(virQEMUDriver *driver,
                       virDomainObj *vm);

bool
qemuSnapshotUndoIsAhead(virDomainObj *vm);

qemuSnapshotUndoOverlay
qemuSnapshotUndoLookAt(virDomainDef *def,
                       virDomainSnapshotDef *snapdef,
                       virDomainSnapshotDiskDef *snapdisk);

void
qemuSnapshotUndoWaitStopped(virDomainObj *vm);

void
qemuSnapshotUndoStopped(virDomainObj *vm,
                        virDomainShutoffReason reason);

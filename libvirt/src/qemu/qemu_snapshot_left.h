/*
 * qemu_snapshot_left.h: undo external snapshots that nobody undoes any more
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

#include "qemu_conf.h"

int
qemuSnapshotLeftRetry(virQEMUDriver *driver,
                      virDomainObj *vm);

void
qemuSnapshotLeftRecoverJob(virDomainObj *vm,
                           virDomainJobObj *job);

void
qemuSnapshotLeftRecover(virQEMUDriver *driver,
                        virDomainObj *vm,
                        virDomainJobObj *job);

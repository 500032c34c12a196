/*
 * Background snapshot: for programs that have no guest RAM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "migration/snapshot-before-write.h"

bool snapshot_traps_kernel_writes;

void background_snapshot_release_iov(QEMUIOVector *qiov, size_t offset,
                                     size_t size)
{
}

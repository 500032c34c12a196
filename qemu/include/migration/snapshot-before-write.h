/*
 * Background snapshot: what traps in the writing thread need of others
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * With such a trap, a system call that writes guest RAM fails with EFAULT: no
 * thread gets a signal for it.
 */
#ifndef MIGRATION_SNAPSHOT_BEFORE_WRITE_H
#define MIGRATION_SNAPSHOT_BEFORE_WRITE_H

#include "qemu/atomic.h"
#include "qemu/iov.h"
#include "migration/snapshot-hooks.h"

/* Private: is a snapshot being taken, with such a trap? */
extern bool snapshot_traps_kernel_writes;

/* Private: background_snapshot_release() for a vector */
void background_snapshot_release_iov(QEMUIOVector *qiov, size_t offset,
                                     size_t size);

/**
 * background_snapshot_before_write: guest RAM may be written by the kernel
 *
 * To be called before a system call that writes guest RAM.  QEMU's own writes
 * need no call.  Has what the range holds saved, which may wait for room in the
 * page buffer; the caller must hold nothing that the thread that writes the
 * stream needs.
 *
 * @host: start of the range
 * @size: its size in bytes
 */
static inline void background_snapshot_before_write(void *host, size_t size)
{
    if (unlikely(qatomic_read(&snapshot_traps_kernel_writes))) {
        background_snapshot_release(host, size);
    }
}

/* The same for @size bytes of a vector, from @offset on */
static inline void background_snapshot_before_write_iov(QEMUIOVector *qiov,
                                                        size_t offset,
                                                        size_t size)
{
    if (unlikely(qatomic_read(&snapshot_traps_kernel_writes))) {
        background_snapshot_release_iov(qiov, offset, size);
    }
}

/**
 * background_snapshot_set_vcpu_check: vCPUs run in the kernel, and tell
 *
 * For an accelerator whose guest code does not run in QEMU, but each of whose
 * vCPUs' threads calls memory_fault_handle() for its denied writes.  Without
 * it, such a VM cannot have traps that are handled in the writing thread.
 *
 * @check: asked, with the BQL held, before such a trap is taken; returns false
 *         with its errp set if the kernel writes guest RAM and does not tell
 */
void background_snapshot_set_vcpu_check(bool (*check)(Error **errp));

#endif

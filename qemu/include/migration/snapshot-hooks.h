/*
 * Background snapshot: what the rest of QEMU must tell it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_HOOKS_H
#define MIGRATION_SNAPSHOT_HOOKS_H

#include "qemu/atomic.h"
#include "qemu/iov.h"

/* Private: are traps armed that the kernel's writes cannot be stopped by? */
extern bool background_snapshot_armed;

/**
 * background_snapshot_release: save a range, and let it be written
 *
 * For who discards guest RAM; other writers need it only as told below.
 */
void background_snapshot_release(void *host, size_t size);
void background_snapshot_release_iov(QEMUIOVector *qiov, size_t offset,
                                     size_t size);

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

/**
 * background_snapshot_may_discard: may pages of guest RAM be discarded now?
 *
 * BQL held.  Returns: false while a snapshot needs each page to exist, which is
 * from before the VM stops until its writes are trapped.  When they are,
 * ram_block_discard_range() has what it discards saved.
 */
bool background_snapshot_may_discard(void);

/**
 * background_snapshot_before_write: guest RAM may be written by the kernel
 *
 * To be called before a system call that writes guest RAM: it would fail on
 * memory whose writes are trapped.  QEMU's own writes need no call.  Has what
 * the range holds saved, which may wait for room in the page buffer; the
 * caller must hold nothing that the thread that writes the stream needs.
 *
 * @host: start of the range
 * @size: its size in bytes
 */
static inline void background_snapshot_before_write(void *host, size_t size)
{
    if (unlikely(qatomic_read(&background_snapshot_armed))) {
        background_snapshot_release(host, size);
    }
}

/* The same for @size bytes of a vector, from @offset on */
static inline void background_snapshot_before_readv(QEMUIOVector *qiov,
                                                    size_t offset, size_t size)
{
    if (unlikely(qatomic_read(&background_snapshot_armed))) {
        background_snapshot_release_iov(qiov, offset, size);
    }
}

#endif

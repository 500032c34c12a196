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

/* Private to background_snapshot_before_write() */
extern bool background_snapshot_armed;
void background_snapshot_release(void *host, size_t size);

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

#endif

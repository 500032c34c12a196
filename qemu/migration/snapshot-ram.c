/*
 * The RAM of a background snapshot: the table of blocks, and the end
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "snapshot-ram-internal.h"

void snapshot_ram_renumber(SnapshotRAM *s)
{
    static unsigned int last_number;

    qatomic_set(&s->number, qatomic_add_fetch(&last_number, 1));
}

SnapshotRAM *snapshot_ram_new(const SnapshotRAMConfig *config, Error **errp)
{
    PageBuffer *buffer = page_buffer_new(config->buffer_size,
                                         config->page_size, errp);
    SnapshotRAM *s;

    if (!buffer) {
        return NULL;
    }
    s = g_new0(SnapshotRAM, 1);
    snapshot_ram_renumber(s);
    s->buffer = buffer;
    s->config = *config;
    s->page_size = config->page_size;
    stat64_set(&s->fault_gap_ns, INT64_MAX);
    s->huge_size = host_pages_huge_size();
    s->can_mend = host_pages_can_collapse();
    if (s->huge_size > MAX_PAGES * s->page_size) {
        /* Would take too long to save */
        s->huge_size = 0;
    }
    qemu_mutex_init(&s->scan_lock);
    qemu_mutex_init(&s->lock);
    qemu_cond_init(&s->released_cond);
    qemu_event_init(&s->mend_event, false);
    return s;
}

void snapshot_ram_close(SnapshotRAM *s)
{
    if (s->trap) {
        s->trap->ops->free(s->trap);
        s->trap = NULL;
    }
    if (s->buffer) {
        page_buffer_free(s->buffer);
        s->buffer = NULL;
    }
}

void snapshot_ram_free(SnapshotRAM *s)
{
    size_t i;

    snapshot_ram_close(s);
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        if (s->config.free_owner) {
            s->config.free_owner(b->owner);
        }
        ram_source_cleanup(&b->source);
        g_free(b->name);
        g_free(b->claimed);
        g_free(b->released);
        g_free(b->armed);
        g_free(b->held);
        g_free(b->huge);
        g_free(b->split);
        g_free(b->rest);
        g_free(b->failed);
    }
    g_free(s->blocks);
    if (s->pages) {
        host_pages_free(s->pages);
    }
    qemu_event_destroy(&s->mend_event);
    qemu_cond_destroy(&s->released_cond);
    qemu_mutex_destroy(&s->lock);
    qemu_mutex_destroy(&s->scan_lock);
    g_free(s);
}

bool snapshot_ram_check_page_size(size_t host_page_size, size_t page_size,
                                  Error **errp)
{
    if (host_page_size > MAX_PAGES * page_size) {
        error_setg(errp, "Memory with pages of %zu bytes cannot be saved: a "
                   "write would have to wait for a copy of a whole page; the "
                   "largest possible are of %zu bytes", host_page_size,
                   MAX_PAGES * page_size);
        return false;
    }
    return true;
}

bool snapshot_ram_add_block(SnapshotRAM *s, const SnapshotBlockInfo *block,
                            Error **errp)
{
    ERRP_GUARD();
    SnapshotBlock *b;
    uint8_t *host = block->host;
    size_t unit_size = MAX(s->page_size, block->host_page_size);
    size_t unit_pages = unit_size / s->page_size;
    size_t i;

    if (!snapshot_ram_check_page_size(block->host_page_size, s->page_size,
                                      errp)) {
        error_prepend(errp, "RAM block '%s': ", block->name);
        return false;
    }
    if (unit_pages > page_buffer_num_slots(s->buffer)) {
        error_setg(errp, "RAM block '%s': snapshot-buffer-size is smaller than "
                   "a page of its memory, %zu bytes", block->name,
                   block->host_page_size);
        return false;
    }

    s->blocks = g_renew(SnapshotBlock, s->blocks, s->num_blocks + 1);
    for (i = s->num_blocks; i > 0 && s->blocks[i - 1].source.host > host; i--) {
        s->blocks[i] = s->blocks[i - 1];
    }
    s->num_blocks++;

    b = &s->blocks[i];
    memset(b, 0, sizeof(*b));
    b->owner = block->owner;
    b->name = g_strdup(block->name);
    b->size = block->size;
    b->writable = block->writable;
    b->save = block->save;
    b->unit_pages = unit_pages;
    b->unit_size = unit_size;
    b->num_units = DIV_ROUND_UP(block->size, unit_size);
    b->source = (RAMSource) {
        .host = host,
        .size = b->num_units * unit_size,
        .unit_size = unit_size,
        .shared = block->shared,
        .hugetlb = block->host_page_size > qemu_real_host_page_size(),
        .fd = block->fd,
        .fd_offset = block->fd_offset,
    };
    b->claimed = bitmap_new(b->num_units);
    b->released = bitmap_new(b->num_units);
    if (s->huge_size > unit_size) {
        b->huge_host = QEMU_ALIGN_PTR_DOWN(host, s->huge_size);
        b->num_huge = DIV_ROUND_UP(host + b->num_units * unit_size -
                                   b->huge_host, s->huge_size);
        b->huge = bitmap_new(b->num_huge);
        b->split = bitmap_new(b->num_huge);
        b->rest = bitmap_new(b->num_huge);
        b->failed = bitmap_new(b->num_huge);
    }
    return true;
}

void snapshot_ram_for_each_owner(SnapshotRAM *s,
                                 void (*fn)(void *owner, void *opaque),
                                 void *opaque)
{
    size_t i;

    for (i = 0; i < s->num_blocks; i++) {
        fn(s->blocks[i].owner, opaque);
    }
}

bool snapshot_ram_may_arm(SnapshotRAM *s, Error **errp)
{
    if (s->stopping) {
        error_setg(errp, "%s", snapshot_ram_failure(s) ?:
                   "the snapshot is being stopped");
    }
    return !s->stopping;
}

void snapshot_ram_stop(SnapshotRAM *s)
{
    size_t num_armed, i;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        s->stopping = true;
        num_armed = s->num_armed;
    }
    for (i = 0; i < num_armed; i++) {
        SnapshotBlock *b = &s->blocks[i];
        int ret = 0;

        /* One call for all, which leaves the host fewer mappings, not more */
        if (b->writable && s->trap) {
            ret = s->trap->ops->release(s->trap, b->source.host,
                                        b->source.size);
        }
        if (ret < 0) {
            error_report("Cannot release write-protected guest RAM: %s",
                         strerror(-ret));
        }
    }

    /* Only now: whoever sees this may write, also by a system call */
    qatomic_set(&s->stopped, true);
    if (s->buffer) {
        page_buffer_stop(s->buffer);
    }
    qemu_event_set(&s->mend_event);
    QEMU_LOCK_GUARD(&s->lock);
    qemu_cond_broadcast(&s->released_cond);
}

void snapshot_ram_fail(SnapshotRAM *s, const char *failure)
{
    /* The first reason is the one to tell */
    qatomic_cmpxchg(&s->failure, NULL, failure);
    snapshot_ram_stop(s);
}

const char *snapshot_ram_failure(SnapshotRAM *s)
{
    return qatomic_read(&s->failure);
}

void snapshot_ram_get_mend_stats(SnapshotRAM *s, SnapshotRAMStats *stats)
{
    stats->huge_mended = stat64_get(&s->huge_mended);
    stats->huge_split = stat64_get(&s->huge_split);
}

/* Who counts a fault adds to what is read last first, so that all agrees */
void snapshot_ram_get_stats(SnapshotRAM *s, SnapshotRAMStats *stats)
{
    size_t i;

    stats->longest_stall_ns = stat64_get(&s->longest_stall_ns);
    stats->stall_ns = stat64_get(&s->stall_ns);
    for (i = 0; i < SNAPSHOT_RAM_STALL_LENGTHS; i++) {
        stats->stalls[i] = stat64_get(&s->stalls[i]);
    }
    stats->let_through = stat64_get(&s->let_through);
    stats->faults = stat64_get(&s->faults);
    stats->waits = stat64_get(&s->waits);
    stats->waiting = page_buffer_waiting(s->buffer) +
                     qatomic_read(&s->waiters);
    stats->fault_pages = stat64_get(&s->fault_pages);
    stats->scan_pages = stat64_get(&s->scan_pages);
    stats->untouched_pages = stat64_get(&s->untouched_pages);
    stats->zero_pages = stat64_get(&s->zero_pages);
    snapshot_ram_get_mend_stats(s, stats);
    stats->buffer_used = page_buffer_used(s->buffer);
    stats->buffer_peak = page_buffer_peak(s->buffer);
}

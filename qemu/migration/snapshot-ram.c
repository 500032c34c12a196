/*
 * The RAM of a background snapshot: block table and scanner
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

SnapshotRAM *snapshot_ram_new(PageBuffer *buffer,
                              const SnapshotRAMConfig *config)
{
    static unsigned int num_snapshots;
    SnapshotRAM *s = g_new0(SnapshotRAM, 1);

    s->number = qatomic_add_fetch(&num_snapshots, 1);
    s->buffer = buffer;
    s->config = *config;
    s->page_size = config->page_size;
    s->huge_size = host_pages_huge_size();
    s->can_mend = host_pages_can_collapse();
    if (s->huge_size > MAX_PAGES * s->page_size) {
        /* Would take too long to save */
        s->huge_size = 0;
    }
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
    s->buffer = NULL;
}

void snapshot_ram_free(SnapshotRAM *s)
{
    size_t i;

    snapshot_ram_close(s);
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        ram_source_cleanup(&b->source);
        g_free(b->name);
        g_free(b->claimed);
        g_free(b->released);
        g_free(b->huge);
        g_free(b->split);
        g_free(b->failed);
    }
    g_free(s->blocks);
    if (s->pages) {
        host_pages_free(s->pages);
    }
    qemu_event_destroy(&s->mend_event);
    qemu_cond_destroy(&s->released_cond);
    qemu_mutex_destroy(&s->lock);
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

bool snapshot_ram_add_block(SnapshotRAM *s, const SnapshotRAMBlock *block,
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
    for (i = s->num_blocks; i > 0 && s->blocks[i - 1].host > host; i--) {
        s->blocks[i] = s->blocks[i - 1];
    }
    s->num_blocks++;

    b = &s->blocks[i];
    memset(b, 0, sizeof(*b));
    b->ram = *block;
    b->name = g_strdup(block->name);
    b->host = host;
    b->unit_pages = unit_pages;
    b->unit_size = unit_size;
    b->num_units = DIV_ROUND_UP(block->size, unit_size);
    b->claimed = bitmap_new(b->num_units);
    b->released = bitmap_new(b->num_units);
    if (s->huge_size > unit_size) {
        b->huge_host = QEMU_ALIGN_PTR_DOWN(host, s->huge_size);
        b->num_huge = DIV_ROUND_UP(host + b->num_units * unit_size -
                                   b->huge_host, s->huge_size);
        b->huge = bitmap_new(b->num_huge);
        b->split = bitmap_new(b->num_huge);
        b->failed = bitmap_new(b->num_huge);
    }
    return true;
}

/* Find out what exists, of private memory just before it is armed */
static bool look(SnapshotRAM *s, SnapshotBlock *b, Error **errp)
{
    ERRP_GUARD();

    if (ram_source_look(&b->source, b->huge, errp)) {
        return true;
    }
    error_prepend(errp, "RAM block '%s': ", b->name);
    return false;
}

bool snapshot_ram_set_trap(SnapshotRAM *s, const WriteTrapOps *ops,
                           Error **errp)
{
    ERRP_GUARD();
    SnapshotBlock *last = &s->blocks[s->num_blocks - 1];
    uint8_t *start = s->blocks[0].host;
    size_t i;

    s->pages = host_pages_new(true, ops->arms_untouched ? NULL : errp);
    if (!s->pages && !ops->arms_untouched) {
        return false;
    }
    if (s->pages) {
        host_pages_prepare(s->pages);
    }
    s->trap = ops->new(start,
                       last->host + last->num_units * last->unit_size - start,
                       snapshot_ram_fault, s, errp);
    if (!s->trap) {
        return false;
    }
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        b->source = (RAMSource) {
            .host = b->host,
            .size = b->num_units * b->unit_size,
            .unit_size = b->unit_size,
            .shared = b->ram.shared,
            .hugetlb = b->ram.host_page_size > qemu_real_host_page_size(),
            .fd = b->ram.fd,
            .fd_offset = b->ram.fd_offset,
        };
        ram_source_init(&b->source, s->pages);
        if (b->ram.writable &&
            !ops->add(s->trap, b->host, b->source.size, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            return false;
        }
        if (b->ram.writable && !b->ram.shared && ops->prepare) {
            ops->prepare(s->trap, b->host);
        }
        /* Of shared memory it is only about huge pages, and takes time */
        if (b->ram.shared && !look(s, b, errp)) {
            return false;
        }
    }
    return true;
}

bool snapshot_ram_arm(SnapshotRAM *s, Error **errp)
{
    ERRP_GUARD();

    while (s->num_armed < s->num_blocks) {
        SnapshotBlock *b = &s->blocks[s->num_armed++];
        bool ok = b->ram.shared || look(s, b, errp);

        if (ok && b->ram.writable &&
            !s->trap->ops->arm(s->trap, b->host, b->source.size, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            ok = false;
        }
        if (!ok) {
            snapshot_ram_stop(s);
            return false;
        }
    }
    return true;
}

/* Save what does not exist, in one piece.  Returns false if there is none. */
static bool scan_zero(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                      bool *room)
{
    size_t max = MIN(ZERO_SLOTS, page_buffer_num_slots(s->buffer));
    size_t zero = ram_source_zero_units(&b->source, first);
    size_t end = first + MIN(zero, ZERO_SIZE / b->unit_size);
    size_t n;

    if (zero < 2 || max < b->unit_pages) {
        return false;
    }
    n = page_buffer_try_take(s->buffer, s->scan_slots, b->unit_pages, max,
                             page_buffer_num_slots(s->buffer) / 2);
    *room = n > 0;
    if (n) {
        stat64_add(&s->scan_pages,
                   snapshot_ram_save_zero(s, b, first, &end, s->scan_slots, n));
        s->scan_unit = end;
    }
    return true;
}

bool snapshot_ram_scan(SnapshotRAM *s)
{
    size_t leave = page_buffer_num_slots(s->buffer) / 2;

    while (!snapshot_ram_scan_done(s)) {
        SnapshotBlock *b = &s->blocks[s->scan_block];
        size_t first, end, range, min, n;
        bool room = true;

        first = find_next_zero_bit(b->claimed, b->num_units, s->scan_unit);
        if (first == b->num_units) {
            s->scan_block++;
            s->scan_unit = 0;
            continue;
        }
        if (scan_zero(s, b, first, &room)) {
            return room;
        }

        /* Up to where the next huge page may begin */
        range = huge_range(s, b, first);
        end = b->num_huge ? huge_end(s, b, range)
                          : MIN(first + MAX_PAGES / b->unit_pages,
                                b->num_units);
        /* Somebody may claim @first meanwhile, and does its saving then */
        end = find_next_bit(b->claimed, end, first + 1);

        /* One that nobody has split is saved as a whole, or later */
        min = b->unit_pages;
        if (b->num_huge && test_bit(range, b->huge) &&
            first == huge_first(s, b, range) &&
            end == huge_end(s, b, range) &&
            (end - first) * b->unit_pages <= leave) {
            min = (end - first) * b->unit_pages;
        }
        n = page_buffer_try_take(s->buffer, s->scan_slots, min,
                                 (end - first) * b->unit_pages, leave);
        if (!n) {
            return false;
        }
        end = first + n / b->unit_pages;
        stat64_add(&s->scan_pages,
                   snapshot_ram_save_units(s, b, first, end, s->scan_slots, n));
        s->scan_unit = end;
        return true;
    }
    return false;
}

bool snapshot_ram_scan_done(SnapshotRAM *s)
{
    return s->scan_block == s->num_blocks;
}

void snapshot_ram_stop(SnapshotRAM *s)
{
    size_t i;

    for (i = 0; i < s->num_armed; i++) {
        SnapshotBlock *b = &s->blocks[i];
        int ret = 0;

        /* One call for all, which leaves the host fewer mappings, not more */
        if (b->ram.writable && s->trap) {
            ret = s->trap->ops->release(s->trap, b->host, b->source.size);
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

void snapshot_ram_get_stats(SnapshotRAM *s, SnapshotRAMStats *stats)
{
    stats->faults = stat64_get(&s->faults);
    stats->waits = stat64_get(&s->waits);
    stats->fault_pages = stat64_get(&s->fault_pages);
    stats->scan_pages = stat64_get(&s->scan_pages);
    stats->zero_pages = stat64_get(&s->zero_pages);
    stats->untouched_pages = stat64_get(&s->untouched_pages);
    stats->huge_split = stat64_get(&s->huge_split);
    stats->huge_mended = stat64_get(&s->huge_mended);
}

/*
 * The RAM of a background snapshot: what to write next
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "snapshot-ram-internal.h"

/* How much the scanner may be behind its bandwidth and still make up for it */
#define MAX_LAG_US 100000

/* While it must pause, guest writes' pages are looked for this often */
#define PAUSE_US 5000

/* What one thread has chosen to save, with slots for it */
typedef struct Run {
    SnapshotBlock *block;
    size_t first;
    size_t end;
    /* Nothing of it exists */
    bool zero;
    size_t num_slots;
    uint32_t slots[MAX_PAGES];
} Run;

bool snapshot_ram_scan_done(SnapshotRAM *s)
{
    return qatomic_read(&s->scan_block) == s->num_blocks;
}

/* Choose what does not exist, in one piece.  Returns false if there is none. */
static bool choose_zero(SnapshotRAM *s, Run *run)
{
    SnapshotBlock *b = run->block;
    size_t max = MIN(ZERO_SLOTS, page_buffer_num_slots(s->buffer));
    size_t zero = ram_source_zero_units(&b->source, run->first);

    if (zero < 2 || max < b->unit_pages) {
        return false;
    }
    run->zero = true;
    run->end = run->first + zero;
    run->num_slots = page_buffer_try_take(s->buffer, run->slots, b->unit_pages,
                                          max,
                                          page_buffer_num_slots(s->buffer) / 2);
    return true;
}

/* Choose up to where the next huge page may begin */
static void choose_data(SnapshotRAM *s, Run *run)
{
    SnapshotBlock *b = run->block;
    size_t leave = page_buffer_num_slots(s->buffer) / 2;
    size_t range = huge_range(s, b, run->first);
    size_t end = b->num_huge ? huge_end(s, b, range)
                             : MIN(run->first + MAX_PAGES / b->unit_pages,
                                   b->num_units);
    size_t min = b->unit_pages;

    /* Somebody may claim the first meanwhile, and does its saving then */
    end = find_next_bit(b->claimed, end, run->first + 1);

    /* One that nobody has split is saved as a whole, or later */
    if (b->num_huge && test_bit(range, b->huge) &&
        run->first == huge_first(s, b, range) && end == huge_end(s, b, range) &&
        (end - run->first) * b->unit_pages <= leave) {
        min = (end - run->first) * b->unit_pages;
    }
    run->num_slots = page_buffer_try_take(s->buffer, run->slots, min,
                                          (end - run->first) * b->unit_pages,
                                          leave);
    run->end = run->first + run->num_slots / b->unit_pages;
}

/*
 * Choose what is left of a huge page that was split, so that no more writes are
 * stopped there.  Returns false if there is none.
 */
static bool choose_rest(SnapshotRAM *s, Run *run)
{
    size_t i, range, end;

    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = run->block = &s->blocks[i];

        while ((range = find_first_bit(b->rest, b->num_huge)) < b->num_huge) {
            clear_bit_atomic(range, b->rest);
            end = huge_end(s, b, range);
            run->first = find_next_zero_bit(b->claimed, end,
                                            huge_first(s, b, range));
            if (run->first < end) {
                choose_data(s, run);
                if (run->end < end) {
                    set_bit_atomic(range, b->rest);
                }
                return true;
            }
        }
    }
    return false;
}

/* Returns false if there is no room, or nothing is left */
static bool choose_run(SnapshotRAM *s, Run *run)
{
    QEMU_LOCK_GUARD(&s->scan_lock);

    run->zero = false;
    if (choose_rest(s, run)) {
        return run->num_slots;
    }
    for (; s->scan_block < s->num_blocks; s->scan_unit = 0) {
        run->block = &s->blocks[s->scan_block];
        run->first = find_next_zero_bit(run->block->claimed,
                                        run->block->num_units, s->scan_unit);
        if (run->first == run->block->num_units) {
            qatomic_set(&s->scan_block, s->scan_block + 1);
            continue;
        }
        if (!choose_zero(s, run)) {
            choose_data(s, run);
        }
        s->scan_unit = run->num_slots ? run->end : run->first;
        return run->num_slots;
    }
    return false;
}

/* Scan from there again, unless another thread has gone back further */
static void go_back(SnapshotRAM *s, size_t block, size_t unit)
{
    QEMU_LOCK_GUARD(&s->scan_lock);

    if (block < s->scan_block ||
        (block == s->scan_block && unit < s->scan_unit)) {
        qatomic_set(&s->scan_block, block);
        s->scan_unit = unit;
    }
}

void snapshot_ram_fill_pages(SnapshotRAM *s, SnapshotPage *pages,
                             const uint32_t *slots, size_t n)
{
    size_t i;

    for (i = 0; i < n; i++) {
        PageBufferEntry *entry = page_buffer_entry(s->buffer, slots[i]);

        pages[i] = (SnapshotPage) {
            .owner = entry->owner,
            .offset = entry->offset,
            .data = entry->zero_pages ? NULL
                                      : page_buffer_data(s->buffer, slots[i]),
            .num_pages = MAX(1, entry->zero_pages),
            .slot = slots[i],
        };
    }
}

bool snapshot_ram_scan(SnapshotRAM *s,
                       SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT],
                       size_t *num_pages)
{
    Run run;
    size_t used, saved, end;

    if (!choose_run(s, &run)) {
        return false;
    }
    end = run.end;
    saved = run.zero
        ? snapshot_ram_save_zero(s, run.block, run.first, &end, run.slots,
                                 run.num_slots, &used)
        : snapshot_ram_save_units(s, run.block, run.first, end, run.slots,
                                  &used);
    if (end < run.end) {
        /* There were not slots enough */
        go_back(s, run.block - s->blocks, end);
    }
    stat64_add(&s->scan_pages, saved);
    snapshot_ram_fill_pages(s, pages, run.slots, used);
    page_buffer_give(s->buffer, run.slots + used, run.num_slots - used);
    *num_pages = used;
    return true;
}

size_t snapshot_ram_queued(SnapshotRAM *s,
                           SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT],
                           bool wait)
{
    uint32_t slots[SNAPSHOT_RAM_MAX_NEXT];
    size_t n;

    n = page_buffer_dequeue(s->buffer, slots, ARRAY_SIZE(slots), wait);
    snapshot_ram_fill_pages(s, pages, slots, n);
    return n;
}

/* Must the scanner pause, for its bandwidth?  That may be another by now. */
static bool must_pause(SnapshotRAM *s)
{
    double bandwidth = s->config.bandwidth ? s->config.bandwidth() : 0;
    int64_t now_us = g_get_monotonic_time();
    QEMU_LOCK_GUARD(&s->scan_lock);

    s->debt -= bandwidth * (now_us - s->debt_us) / G_USEC_PER_SEC;
    s->debt = bandwidth ? MAX(s->debt, -bandwidth * MAX_LAG_US / G_USEC_PER_SEC)
                        : 0;
    s->debt_us = now_us;
    return s->debt > 0;
}

static void add_debt(SnapshotRAM *s, const SnapshotPage *pages, size_t n)
{
    size_t i, size = 0;

    if (!s->config.bandwidth || !s->config.bandwidth()) {
        return;
    }
    for (i = 0; i < n; i++) {
        size += pages[i].data ? s->page_size : 0;
    }
    QEMU_LOCK_GUARD(&s->scan_lock);
    s->debt += size;
}

size_t snapshot_ram_next(SnapshotRAM *s,
                         SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT])
{
    while (!qatomic_read(&s->stopped)) {
        unsigned int given = page_buffer_given(s->buffer);
        bool done = snapshot_ram_scan_done(s);
        size_t n;

        stat64_set(&s->last_next_ns, get_clock());
        page_buffer_warm(s->buffer);
        n = snapshot_ram_queued(s, pages, false);
        if (!n && !done && must_pause(s)) {
            g_usleep(PAUSE_US);
            continue;
        }
        if (!n && done) {
            n = snapshot_ram_queued(s, pages, true);
        } else if (!n && !snapshot_ram_scan(s, pages, &n)) {
            page_buffer_wait(s->buffer, given);
        }
        if (n) {
            add_debt(s, pages, n);
            return n;
        }
        if (done) {
            return 0;
        }
    }
    return 0;
}

void snapshot_ram_written(SnapshotRAM *s, const SnapshotPage *pages, size_t n)
{
    uint32_t slots[SNAPSHOT_RAM_MAX_NEXT];
    size_t i;

    assert(n <= ARRAY_SIZE(slots));
    for (i = 0; i < n; i++) {
        slots[i] = pages[i].slot;
    }
    page_buffer_give(s->buffer, slots, n);
}

bool snapshot_ram_is_saved(SnapshotRAM *s)
{
    return snapshot_ram_scan_done(s) && !qatomic_read(&s->stopped);
}

/*
 * The RAM of a background snapshot: what to write next
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "snapshot-ram-internal.h"

bool snapshot_ram_scan_done(SnapshotRAM *s)
{
    return s->scan_block == s->num_blocks;
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

size_t snapshot_ram_queued(SnapshotRAM *s, SnapshotPage *pages, size_t max,
                           bool wait)
{
    uint32_t slots[SNAPSHOT_RAM_MAX_NEXT];
    size_t i, n;

    n = page_buffer_dequeue(s->buffer, slots, MIN(max, ARRAY_SIZE(slots)),
                            wait);
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
    return n;
}

size_t snapshot_ram_next(SnapshotRAM *s, SnapshotPage *pages, size_t max)
{
    size_t n;

    while (!qatomic_read(&s->stopped)) {
        page_buffer_warm(s->buffer);
        n = snapshot_ram_queued(s, pages, max, false);
        if (n) {
            return n;
        }
        if (snapshot_ram_scan(s)) {
            continue;
        }
        n = snapshot_ram_queued(s, pages, max, true);
        if (n || snapshot_ram_scan_done(s)) {
            return n;
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

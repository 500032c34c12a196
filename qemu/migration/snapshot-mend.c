/*
 * The RAM of a background snapshot: huge pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * To release a part of a huge page, the host splits it.  Then each access to
 * its memory costs more, much more where page tables are nested or shadowed,
 * until the host's khugepaged comes along, which may take hours.  So what a
 * stopped write has split is saved as a whole soon after, and made huge again.
 */
#include "qemu/osdep.h"
#include "qemu/timer.h"
#include "snapshot-ram-internal.h"
#include "trace.h"

/* When to look again after what cannot be mended yet */
#define MEND_PAUSE_US 5000

/* What is split is mended after so long even if it is never quiet */
#define MAX_UNQUIET_NS (5 * NANOSECONDS_PER_SECOND)

/* Does all of a range exist, so that to collapse it takes no new memory? */
static bool is_whole(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                     size_t end, bool *huge)
{
    unsigned long exist[BITS_TO_LONGS(MAX_PAGES)] = {};
    unsigned long is_huge = 0;
    size_t num = end - first;

    if (!s->pages ||
        !host_pages_find(s->pages, b->source.host + first * b->unit_size,
                         num * b->unit_size, b->unit_size, false, exist,
                         host_pages_know_huge(s->pages) ? &is_huge : NULL,
                         NULL)) {
        return false;
    }
    *huge = is_huge;
    if (b->source.shared) {
        /* In its file, whatever the page tables say */
        return ram_source_has_no_hole(&b->source, first, end);
    }
    return find_next_zero_bit(exist, num, 0) == num;
}

/*
 * Save what is left of a range, if those are busy writing who would do it.
 * Returns whether all of it is released.
 */
static bool save_rest(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                      size_t end, bool *saved)
{
    /* Faults must find room as well; what is saved here spares them some */
    size_t leave = page_buffer_num_slots(s->buffer) / 4;
    size_t unit = first;

    if (get_clock() - (int64_t)stat64_get(&s->last_next_ns) <
        s->config.stuck_ns) {
        return find_next_zero_bit(b->released, end, first) == end;
    }
    while ((unit = find_next_zero_bit(b->claimed, end, unit)) < end) {
        /* Somebody may claim @unit meanwhile, and does its saving then */
        size_t last = find_next_bit(b->claimed, end, unit + 1);
        size_t n = page_buffer_try_take(s->buffer, s->mend_slots,
                                        b->unit_pages,
                                        (last - unit) * b->unit_pages, leave);
        size_t used;

        if (!n) {
            return false;
        }
        last = unit + n / b->unit_pages;
        stat64_add(&s->scan_pages,
                   snapshot_ram_save_units(s, b, unit, last, s->mend_slots,
                                           &used));
        snapshot_ram_queue(s, s->mend_slots, used, n);
        *saved = true;
        unit = last;
    }
    /* Others may still copy a part */
    return find_next_zero_bit(b->released, end, first) == end;
}

/*
 * Is this the time to have the host make huge pages?  Faults have to wait for
 * that; but to wait for too long slows the guest down as well.
 */
static bool is_quiet(SnapshotRAM *s)
{
    int64_t now_ns = get_clock();

    if (qatomic_read(&s->stopped) ||
        now_ns - (int64_t)stat64_get(&s->last_fault_ns) > s->config.quiet_ns) {
        s->mend_quiet_ns = now_ns;
        return true;
    }
    if (!s->mend_quiet_ns) {
        s->mend_quiet_ns = now_ns;
    }
    return now_ns - s->mend_quiet_ns > MAX_UNQUIET_NS;
}

/* Returns true if something was done */
static bool mend(SnapshotRAM *s, SnapshotBlock *b, size_t range)
{
    size_t first = huge_first(s, b, range);
    size_t end = huge_end(s, b, range);
    bool saved = false, huge = false, whole;
    int ret;

    if (!qatomic_read(&s->stopped) && !save_rest(s, b, first, end, &saved)) {
        return saved;
    }
    if (!is_quiet(s)) {
        return saved;
    }
    clear_bit_atomic(range, b->split);
    whole = is_whole(s, b, first, end, &huge);
    if (huge) {
        stat64_add(&s->huge_mended, 1);
        return true;
    }
    /* A page that the host is moving does not exist either, for a moment */
    ret = whole ? host_pages_collapse(b->huge_host + range * s->huge_size,
                                      s->huge_size) : -ENOENT;
    trace_snapshot_ram_mend(b->name, range, ret);
    if (ret == 0) {
        stat64_add(&s->huge_mended, 1);
    } else {
        /* Once more, when the traps are gone */
        set_bit_atomic(range, b->failed);
    }
    return true;
}

bool snapshot_ram_mend(SnapshotRAM *s)
{
    size_t blocks;

    /* Once round all of them */
    for (blocks = 0; s->can_mend && blocks <= s->num_blocks; blocks++) {
        SnapshotBlock *b = &s->blocks[s->mend_block];

        while (s->mend_range < b->num_huge) {
            size_t range = find_next_bit(b->split, b->num_huge, s->mend_range);

            s->mend_range = range + 1;
            if (range < b->num_huge && mend(s, b, range)) {
                return true;
            }
        }
        s->mend_block = (s->mend_block + 1) % s->num_blocks;
        s->mend_range = 0;
    }
    return false;
}

bool snapshot_ram_mend_wait(SnapshotRAM *s)
{
    bool pending = false;
    size_t i;

    qemu_event_reset(&s->mend_event);
    for (i = 0; s->can_mend && i < s->num_blocks && !pending; i++) {
        SnapshotBlock *b = &s->blocks[i];

        pending = find_first_bit(b->split, b->num_huge) < b->num_huge;
    }
    if (!qatomic_read(&s->stopped)) {
        if (pending) {
            /* It needs room in the buffer, or somebody else copies a part */
            g_usleep(MEND_PAUSE_US);
        } else {
            qemu_event_wait(&s->mend_event);
        }
    }
    return !qatomic_read(&s->stopped);
}

/* All are to be mended, also those that were not split before */
static void count_split(SnapshotRAM *s, const SnapshotBlock *b)
{
    size_t range;

    for (range = 0; range < b->num_huge; range++) {
        if (test_bit(range, b->huge) && !test_bit(range, b->split) &&
            !test_bit(range, b->failed)) {
            stat64_add(&s->huge_split, 1);
        }
    }
}

size_t snapshot_ram_mend_rest(SnapshotRAM *s)
{
    size_t i, count = 0;

    for (i = 0; s->can_mend && i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        if (!b->num_huge) {
            continue;
        }
        if (b->source.shared && b->writable && !s->mending_rest) {
            /* A trap may have split all of them */
            count_split(s, b);
            bitmap_copy(b->split, b->huge, b->num_huge);
        } else {
            bitmap_or(b->split, b->split, b->failed, b->num_huge);
        }
        bitmap_clear(b->failed, 0, b->num_huge);
        count += bitmap_count_one(b->split, b->num_huge);
    }
    s->mending_rest = true;
    return count;
}

/* Returns the block of a table with the same memory, or NULL */
static const SnapshotBlock *same_block(const SnapshotRAM *s,
                                       const SnapshotBlock *b)
{
    size_t i;

    for (i = 0; i < s->num_blocks; i++) {
        if (s->blocks[i].huge_host == b->huge_host &&
            s->blocks[i].num_huge == b->num_huge) {
            return &s->blocks[i];
        }
    }
    return NULL;
}

void snapshot_ram_inherit(SnapshotRAM *s, const SnapshotRAM *from)
{
    size_t i, range;

    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];
        const SnapshotBlock *old = b->num_huge ? same_block(from, b) : NULL;

        if (!old) {
            continue;
        }
        for (range = 0; range < b->num_huge; range++) {
            if (test_bit(range, old->split) || test_bit(range, old->failed)) {
                set_bit_atomic(range, b->huge);
                if (!unit_test(b->split, range)) {
                    set_bit_atomic(range, b->split);
                    stat64_add(&s->huge_split, 1);
                }
            }
        }
    }
    qemu_event_set(&s->mend_event);
}

/*
 * The RAM of a background snapshot: the one door
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "snapshot-ram-internal.h"

__thread bool snapshot_ram_copying;

/* Claim units of one word of the map.  Returns those that are the caller's. */
static unsigned long claim(SnapshotBlock *b, size_t first, size_t end)
{
    unsigned long *word = &b->claimed[BIT_WORD(first)];
    unsigned long mask = BITMAP_FIRST_WORD_MASK(first) &
                         BITMAP_LAST_WORD_MASK(end);

    return mask & ~qatomic_fetch_or(word, mask);
}

/* What one thread has saved: counted here, as all of them share the totals */
typedef struct Saved {
    size_t pages;
    size_t zero;
    size_t untouched;
} Saved;

static size_t add_saved(SnapshotRAM *s, const Saved *saved)
{
    if (saved->zero) {
        stat64_add(&s->zero_pages, saved->zero);
    }
    if (saved->untouched) {
        stat64_add(&s->untouched_pages, saved->untouched);
    }
    return saved->pages;
}

/* Say that a page is all zeroes.  Returns the number of slots used by now. */
static size_t add_zero(SnapshotRAM *s, SnapshotBlock *b, size_t offset,
                       const uint32_t *slots, size_t used, Saved *saved)
{
    PageBufferEntry *entry;

    saved->zero++;
    if (used) {
        entry = page_buffer_entry(s->buffer, slots[used - 1]);
        if (entry->zero_pages &&
            entry->offset + entry->zero_pages * s->page_size == offset) {
            entry->zero_pages++;
            return used;
        }
    }
    entry = page_buffer_entry(s->buffer, slots[used]);
    entry->owner = b->owner;
    entry->offset = offset;
    entry->zero_pages = 1;
    return used + 1;
}

/* The pages of a unit, which may go beyond what there is to save */
static size_t last_page(SnapshotRAM *s, SnapshotBlock *b, size_t unit)
{
    return MIN((unit + 1) * b->unit_pages, b->size / s->page_size);
}

/*
 * Copy a claimed unit, from slot @used on.  Returns the number of slots used
 * by now, and adds to @saved.
 */
static size_t copy_unit(SnapshotRAM *s, SnapshotBlock *b, size_t unit,
                        const uint32_t *slots, size_t used, Saved *saved)
{
    RAMSourceKind kind = ram_source_find(&b->source, unit);
    size_t end = last_page(s, b, unit);
    size_t page;

    for (page = unit * b->unit_pages; page < end; page++) {
        size_t offset = page * s->page_size;
        PageBufferEntry *entry;
        uint8_t *data, *from;

        if (!test_bit(page, b->save)) {
            continue;
        }
        saved->pages++;
        if (kind == RAM_SOURCE_ZERO) {
            saved->untouched++;
            used = add_zero(s, b, offset, slots, used, saved);
            continue;
        }
        data = page_buffer_data(s->buffer, slots[used]);
        from = b->source.host + offset;
        if (kind == RAM_SOURCE_FILE) {
            ram_source_read(&b->source, offset, data, s->page_size);
            from = data;
        }
        if (s->config.detect_zero && buffer_is_zero(from, s->page_size)) {
            used = add_zero(s, b, offset, slots, used, saved);
            continue;
        }
        if (from != data) {
            memcpy(data, from, s->page_size);
        }
        entry = page_buffer_entry(s->buffer, slots[used++]);
        entry->owner = b->owner;
        entry->offset = offset;
        entry->zero_pages = 0;
    }
    return used;
}

/* Take note of huge pages that were split by what has been released */
static void note_split(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                       size_t end)
{
    size_t range, last;

    if (!b->num_huge) {
        return;
    }
    last = huge_range(s, b, end - 1);
    for (range = huge_range(s, b, first); range <= last; range++) {
        if (test_bit(range, b->huge) && !unit_test(b->split, range) &&
            (first > huge_first(s, b, range) || end < huge_end(s, b, range))) {
            set_bit_atomic(range, b->rest);
            set_bit_atomic(range, b->split);
            stat64_add(&s->huge_split, 1);
            qemu_event_set(&s->mend_event);
        }
    }
}

static void release_units(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                          size_t end)
{
    bool armed = b->writable && (s->trap->ops->arms_untouched ||
                                 !is_untouched(b, first, end));
    size_t islands;
    int ret = 0;

    if (armed) {
        /* Whoever sees the page released must find it read */
        smp_mb();
        ret = s->trap->ops->release(s->trap,
                                    b->source.host + first * b->unit_size,
                                    (end - first) * b->unit_size);
    }
    if (ret < 0) {
        snapshot_ram_fail(s, "a write trap could not be released");
        return;
    }

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        islands = s->islands + 1;
        islands -= first > 0 && unit_test(b->released, first - 1);
        islands -= end < b->num_units && unit_test(b->released, end);
        qatomic_set(&s->islands, islands);
        bitmap_set_atomic(b->released, first, end - first);
        if (s->waiters) {
            qemu_cond_broadcast(&s->released_cond);
        }
    }
    if (armed) {
        note_split(s, b, first, end);
    }
}

size_t snapshot_ram_save_units(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                               size_t end, const uint32_t *slots,
                               size_t *num_used)
{
    size_t unit = first, run = first, used = 0;
    Saved saved = {};

    while (unit < end) {
        size_t word_end = MIN(end, QEMU_ALIGN_UP(unit + 1, BITS_PER_LONG));
        unsigned long mine = claim(b, unit, word_end);

        for (; unit < word_end; unit++) {
            if (mine & BIT_MASK(unit)) {
                qatomic_set(&snapshot_ram_copying, true);
                signal_barrier();
                used = copy_unit(s, b, unit, slots, used, &saved);
                signal_barrier();
                qatomic_set(&snapshot_ram_copying, false);
                continue;
            }
            /* Somebody else's: may not be copied yet, so don't release it */
            if (run < unit) {
                release_units(s, b, run, unit);
            }
            run = unit + 1;
        }
        if (run < unit && qatomic_read(&s->waiters) &&
            !is_whole_huge(s, b, run)) {
            /* Perhaps for one of these: better two short releases */
            release_units(s, b, run, unit);
            run = unit;
        }
    }
    if (run < end) {
        release_units(s, b, run, end);
    }
    *num_used = used;
    return add_saved(s, &saved);
}

size_t snapshot_ram_save_zero(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                              size_t *end, const uint32_t *slots,
                              size_t num_slots, size_t *num_used)
{
    size_t unit = first, run = first, used = 0;
    Saved saved = {};

    while (unit < *end && num_slots - used >= b->unit_pages) {
        /* Each page may need a slot, though it seldom does */
        size_t word_end = MIN(MIN(*end, QEMU_ALIGN_UP(unit + 1, BITS_PER_LONG)),
                              unit + (num_slots - used) / b->unit_pages);
        unsigned long mine = claim(b, unit, word_end);

        for (; unit < word_end; unit++) {
            size_t last = last_page(s, b, unit), page;

            if (!(mine & BIT_MASK(unit))) {
                if (run < unit) {
                    release_units(s, b, run, unit);
                }
                run = unit + 1;
                continue;
            }
            for (page = unit * b->unit_pages; page < last; page++) {
                if (test_bit(page, b->save)) {
                    used = add_zero(s, b, page * s->page_size, slots, used,
                                    &saved);
                    saved.pages++;
                    saved.untouched++;
                }
            }
        }
    }
    if (run < unit) {
        release_units(s, b, run, unit);
    }
    *num_used = used;
    *end = unit;
    return add_saved(s, &saved);
}

void snapshot_ram_queue(SnapshotRAM *s, const uint32_t *slots, size_t num_used,
                        size_t num_slots)
{
    page_buffer_queue(s->buffer, slots, num_used);
    page_buffer_give(s->buffer, slots + num_used, num_slots - num_used);
}

/*
 * The RAM of a background snapshot: traps that are armed while the VM runs
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * What the page tables hold takes time to look at and to arm.  So both is done
 * before the VM stops.  A write is let through until then, and what it was near
 * is no longer armed; that much is left to do for the next pass, or for the
 * freeze.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/processor.h"
#include "qemu/timer.h"
#include "snapshot-ram-internal.h"
#include "trace.h"

/*
 * So much is armed at a time at most.  The host keeps others from changing its
 * mappings meanwhile, and a write that is stopped waits.
 */
#define PIECE_SIZE (16 * MiB)

/*
 * Between two ranges that are to be armed, so much is armed with them.  Where
 * islands count, they are mappings, and the host passes over the others.
 */
#define JOIN_SIZE (64 * KiB)

/* A write has this much around it let through, if it is in no huge page */
#define WINDOW_SIZE (64 * KiB)

/*
 * Guests that write faster than their memory is armed are slowed down a bit,
 * the more the longer that takes: each write that is let through by so much
 */
#define FIRST_SLOW_PASS 2
#define MIN_SLOW_US 50
#define MAX_SLOW_US 400

/* How long to wait for the lock without sleeping */
#define SPIN_NS (50 * SCALE_US)

/* Ranges are armed while the VM runs until they are so few, or so many times */
#define FEW_RANGES 16
#define MAX_PASSES 8

/* Is only armed what has existed before, as nothing else can be? */
static bool arms_existing(const SnapshotRAM *s, const SnapshotBlock *b)
{
    return b->source.exist && !s->trap->ops->arms_untouched;
}

/*
 * userfaultfd arms memory of a file also where a private mapping has no page.
 * It seems to have one from then on, so it can be looked at but once.
 *
 * Small blocks take no time.  And the buffer of a TPM is one, which a thread
 * may be about to have a reply read into.
 */
bool snapshot_ram_can_arm_ahead(const SnapshotRAM *s, const SnapshotBlock *b)
{
    return s->config.arm_ahead && b->writable && b->source.size >= 2 * MiB &&
           (s->trap->ops->arms_untouched || b->source.shared ||
            b->source.fd < 0);
}

/*
 * Do islands matter?  Else they are not counted here: where only what exists is
 * armed, anything between may be none.
 */
static bool counts_islands(const SnapshotRAM *s)
{
    return s->trap->max_islands < SIZE_MAX;
}

typedef enum Wanted {
    /* May have come into being, or be gone */
    WANTED_LOOK,
    /* Is to be armed while the VM runs */
    WANTED_ARM,
    /* Is to be armed in the freeze */
    WANTED_ARM_FROZEN,
} Wanted;

/* What of a word of units there is to do */
static unsigned long wanted(const SnapshotRAM *s, const SnapshotBlock *b,
                            size_t word, Wanted what)
{
    unsigned long units = ~b->armed[word];

    if (what == WANTED_LOOK) {
        return b->source.exist ? units & ~b->source.exist[word] : 0;
    }
    if (arms_existing(s, b)) {
        units &= b->source.exist[word];
    }
    return what == WANTED_ARM ? units & ~b->held[word] : units;
}

/* The first unit of a range for which there is; @end if there is none */
static size_t next_wanted(const SnapshotRAM *s, const SnapshotBlock *b,
                          size_t unit, size_t end, Wanted what)
{
    unsigned long mask = BITMAP_FIRST_WORD_MASK(unit), units;
    size_t word;

    for (word = BIT_WORD(unit); word * BITS_PER_LONG < end; word++) {
        units = wanted(s, b, word, what) & mask;
        if (units) {
            return MIN(end, word * BITS_PER_LONG + ctzl(units));
        }
        mask = ~0UL;
    }
    return end;
}

/* Units are armed: those that exist, if nothing else can be */
static void set_armed(const SnapshotRAM *s, SnapshotBlock *b, size_t first,
                      size_t end)
{
    size_t word;

    for (word = BIT_WORD(first); word <= BIT_WORD(end - 1); word++) {
        unsigned long units = arms_existing(s, b) ? b->source.exist[word]
                                                  : ~0UL;

        if (word == BIT_WORD(first)) {
            units &= BITMAP_FIRST_WORD_MASK(first);
        }
        if (word == BIT_WORD(end - 1)) {
            units &= BITMAP_LAST_WORD_MASK(end);
        }
        b->armed[word] |= units;
    }
}

/*
 * Arm the next of what is to be, up to @end, and set @first behind it.  With
 * the lock held.
 */
static bool arm_next(SnapshotRAM *s, SnapshotBlock *b, size_t *first,
                     size_t end, Wanted what, size_t *ranges, Error **errp)
{
    size_t join = counts_islands(s) ? b->num_units : JOIN_SIZE / b->unit_size;
    size_t unit = next_wanted(s, b, *first, end, what);
    size_t next = unit, last;

    *first = end;
    if (unit == end) {
        return true;
    }
    if (what == WANTED_ARM) {
        if (s->islands >= s->trap->max_islands) {
            /* What is held are islands as well; the rest is for the freeze */
            return true;
        }
        end = find_next_bit(b->held, end, unit);
    }
    do {
        last = next + 1;
        next = next_wanted(s, b, last, end, what);
    } while (next < end && next - last <= join);
    if (!s->trap->ops->arm(s->trap, b->source.host + unit * b->unit_size,
                           (last - unit) * b->unit_size, errp)) {
        return false;
    }
    set_armed(s, b, unit, last);
    if (counts_islands(s) && last < b->num_units && test_bit(last, b->held)) {
        s->islands++;
    }
    snapshot_ram_renumber(s);
    ++*ranges;
    *first = last;
    return true;
}

static bool look(SnapshotRAM *s, SnapshotBlock *b, size_t first, size_t end,
                 Error **errp)
{
    return ram_source_look_part(&b->source, first, end, b->huge, errp);
}

/*
 * A mutex is not fair: writers might wait until all of a pass is over.  They
 * don't sleep for so short a time either.
 */
static void let_writers_go_first(SnapshotRAM *s)
{
    int64_t start = get_clock();

    while (qatomic_read(&s->waiting_writers) &&
           get_clock() - start < SPIN_NS) {
        cpu_relax();
    }
}

static void lock_for_writer(SnapshotRAM *s)
{
    int64_t start = get_clock();

    qatomic_inc(&s->waiting_writers);
    while (qemu_mutex_trylock(&s->lock)) {
        if (get_clock() - start >= SPIN_NS) {
            qemu_mutex_lock(&s->lock);
            break;
        }
        cpu_relax();
    }
    qatomic_dec(&s->waiting_writers);
}

/*
 * Look at a range, and arm what is to be.
 *
 * What comes into being in between is not taken for armed, where only that is
 * armed which exists.  It is looked at again.  Where all is armed, it is looked
 * at just after that: whatever is not there then will not be without a write.
 */
static bool arm_piece(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                      size_t end, size_t *ranges, Error **errp)
{
    bool ok = next_wanted(s, b, first, end, WANTED_LOOK) == end ||
              look(s, b, first, end, errp);
    size_t next = first, before = *ranges;

    while (ok && next < end) {
        WITH_QEMU_LOCK_GUARD(&s->lock) {
            ok = snapshot_ram_may_arm(s, errp) &&
                 arm_next(s, b, &next, end, WANTED_ARM, ranges, errp);
        }
        let_writers_go_first(s);
    }
    if (ok && *ranges > before && b->source.exist && !arms_existing(s, b) &&
        find_next_zero_bit(b->source.exist, end, first) < end) {
        ok = look(s, b, first, end, errp);
    }
    return ok;
}

/* Where the range begins, or ends, in which there can be a huge page */
static size_t range_first(const SnapshotRAM *s, const SnapshotBlock *b,
                          size_t unit)
{
    return b->num_huge ? huge_first(s, b, huge_range(s, b, unit))
                       : QEMU_ALIGN_DOWN(unit, MAX_PAGES / b->unit_pages);
}

static size_t range_end(const SnapshotRAM *s, const SnapshotBlock *b,
                        size_t unit)
{
    return b->num_huge ? huge_end(s, b, huge_range(s, b, unit))
                       : MIN(QEMU_ALIGN_UP(unit + 1, MAX_PAGES / b->unit_pages),
                             b->num_units);
}

/* Look at what may have changed, neighbours with one call */
static bool look_frozen(SnapshotRAM *s, SnapshotBlock *b, Error **errp)
{
    size_t unit = next_wanted(s, b, 0, b->num_units, WANTED_LOOK);

    while (unit < b->num_units) {
        size_t first = range_first(s, b, unit), end;

        do {
            end = range_end(s, b, unit);
            unit = next_wanted(s, b, end, b->num_units, WANTED_LOOK);
        } while (unit < b->num_units && range_first(s, b, unit) == end);
        if (!look(s, b, first, end, errp)) {
            return false;
        }
    }
    return true;
}

bool snapshot_ram_arm_rest(SnapshotRAM *s, SnapshotBlock *b,
                           SnapshotArmWork *work, Error **errp)
{
    int64_t start = get_clock(), looked;
    size_t next = 0, i;
    bool ok;

    /* It may have been discarded */
    for (i = 0; b->source.exist && i < BITS_TO_LONGS(b->num_units); i++) {
        b->source.exist[i] &= ~b->held[i];
    }
    ok = look_frozen(s, b, errp);
    looked = get_clock();
    while (ok && next < b->num_units) {
        ok = arm_next(s, b, &next, b->num_units, WANTED_ARM_FROZEN,
                      &work->ranges, errp);
    }
    work->look_ns += looked - start;
    work->arm_ns += get_clock() - looked;
    return ok;
}

/* Ranges that are not armed amid those that are; each write adds one at most */
static size_t count_islands(const SnapshotRAM *s)
{
    size_t count = 0, i;

    for (i = 0; i < s->num_blocks; i++) {
        const SnapshotBlock *b = &s->blocks[i];
        size_t unit = 0;

        while (b->armed && (unit = find_next_zero_bit(b->armed, b->num_units,
                                                      unit)) < b->num_units) {
            unit = find_next_bit(b->armed, b->num_units, unit);
            count++;
        }
    }
    return count;
}

static bool arm_pass(SnapshotRAM *s, size_t *ranges, Error **errp)
{
    ERRP_GUARD();
    size_t i;

    if (counts_islands(s)) {
        QEMU_LOCK_GUARD(&s->lock);
        s->islands = count_islands(s);
    }
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];
        size_t first, end;

        if (!b->armed) {
            continue;
        }
        WITH_QEMU_LOCK_GUARD(&s->lock) {
            if (!snapshot_ram_may_arm(s, errp)) {
                return false;
            }
            s->num_armed = MAX(s->num_armed, i + 1);
        }
        for (first = 0; first < b->num_units; first = end) {
            end = MIN(first + PIECE_SIZE / b->unit_size, b->num_units);
            end = range_end(s, b, end - 1);
            if (!arm_piece(s, b, first, end, ranges, errp)) {
                error_prepend(errp, "RAM block '%s': ", b->name);
                return false;
            }
        }
    }
    return true;
}

bool snapshot_ram_arm_ahead(SnapshotRAM *s, Error **errp)
{
    size_t ranges = SIZE_MAX;
    int pass;

    /* The first one is over all, however little is written */
    for (pass = 0; pass < MAX_PASSES && (pass < 2 || ranges > FEW_RANGES);
         pass++) {
        if (pass >= FIRST_SLOW_PASS) {
            qatomic_set(&s->slow_us,
                        MIN(MIN_SLOW_US << (pass - FIRST_SLOW_PASS),
                            MAX_SLOW_US));
        }
        ranges = 0;
        if (!arm_pass(s, &ranges, errp)) {
            snapshot_ram_stop(s);
            return false;
        }
        trace_snapshot_ram_arm_ahead(pass, ranges);
    }
    return true;
}

/*
 * What is to be let through, so that huge pages stay whole.  What others have
 * told of is held, and that again in whole huge pages.
 */
static void widen(const SnapshotRAM *s, SnapshotBlock *b, size_t *first,
                  size_t *end, bool hold)
{
    size_t around = MAX(1, WINDOW_SIZE / b->unit_size);
    size_t unit[] = { *first, *end - 1 };
    int i;

    for (i = 0; i < ARRAY_SIZE(unit); i++) {
        size_t range = huge_range(s, b, unit[i]);
        size_t low = huge_first(s, b, range), high = huge_end(s, b, range);

        if (!b->num_huge || !(test_bit(range, b->huge) ||
                              is_untouched(b, low, high))) {
            low = QEMU_ALIGN_DOWN(unit[i], around);
            high = MIN(low + around, b->num_units);
        } else if (hold) {
            bitmap_set(b->held, low, high - low);
        }
        *first = MIN(*first, low);
        *end = MAX(*end, high);
    }
    if (s->islands >= s->trap->max_islands) {
        /* No new island: go on to the next one, or to the end of the block */
        *end = find_next_zero_bit(b->armed, b->num_units, *end);
    }
}

bool snapshot_ram_let_through(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                              size_t end, bool hold, bool *again)
{
    bool allowed = true;
    int ret = 0;

    lock_for_writer(s);
    if (s->armed) {
        allowed = false;
    } else if (!b->armed) {
        *again = true;
        if (b - s->blocks < s->num_armed) {
            /* In the freeze, which has failed */
            ret = s->trap->ops->release(s->trap,
                                        b->source.host + first * b->unit_size,
                                        (end - first) * b->unit_size);
        }
    } else {
        *again = !test_bit(first, b->armed);
        if (hold) {
            bitmap_set(b->held, first, end - first);
        }
        widen(s, b, &first, &end, hold);
        if (!*again && counts_islands(s)) {
            s->islands++;
            s->islands -= first > 0 && !test_bit(first - 1, b->armed);
            s->islands -= end < b->num_units && !test_bit(end, b->armed);
        }
        bitmap_clear(b->armed, first, end - first);
        stat64_add(&s->let_through, 1);
        ret = s->trap->ops->release(s->trap,
                                    b->source.host + first * b->unit_size,
                                    (end - first) * b->unit_size);
    }
    qemu_mutex_unlock(&s->lock);
    if (ret < 0) {
        snapshot_ram_fail(s, "a write trap could not be released");
    }
    if (allowed && !hold && !(s->config.urgent && s->config.urgent())) {
        int slow_us = qatomic_read(&s->slow_us);

        if (slow_us) {
            g_usleep(slow_us);
        }
    }
    return allowed;
}

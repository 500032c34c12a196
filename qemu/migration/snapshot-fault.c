/*
 * The RAM of a background snapshot: writes that have to wait for a copy
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/host-utils.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "snapshot-ram-internal.h"

/*
 * A write has this much around it saved and released as well, so that it is
 * not the first of many.  The smaller size takes hardly longer than a page.
 * The larger one is for guests that write so fast that they would be stopped
 * all the time: each write takes longer, but there are far fewer.
 */
#define FAULT_AROUND_SIZE (16 * KiB)
#define FAULT_AROUND_BUSY_SIZE (64 * KiB)

/*
 * To release less than a huge page splits it, which slows the guest down until
 * it is mended, and a whole one takes as long to copy as ten such writes.  Of a
 * guest that writes fast, one in so many gets that: most writes are stopped for
 * a short time, and soon there is not much left that they could split.
 */
#define BUSY_WHOLE 4

/*
 * Writes that come at random often follow each other closely by chance, and
 * what is done for a busy guest makes those wait that do not.  So it is about
 * the average gap between that many or so, in which a long one counts for no
 * more than a few short ones.
 */
#define AVERAGE_OF 8
#define MAX_GAP 8

/* The last fault of this thread that came after its unit's release */
static __thread struct {
    unsigned int number;
    void *unit;
} late_fault;

/* Since when this thread's stalls are added up, and in which snapshot */
static __thread struct {
    unsigned int number;
    int64_t start_ns;
    int64_t stall_ns;
} stall_window;

/* A part of a block to save, and which side to keep if it must be smaller */
typedef struct Window {
    size_t first;
    size_t end;
    enum { KEEP_UNIT, KEEP_FIRST, KEEP_END, KEEP_ZERO } keep;
} Window;

/* How long a call may wait for slots */
typedef struct Patience {
    bool urgent;
    int64_t given_us;
    /* What is left of it */
    int64_t left_us;
    /* When an urgent call must end, also if it never waits */
    int64_t deadline_us;
} Patience;

/* Returns the block that holds @host, or NULL */
static SnapshotBlock *find_block(SnapshotRAM *s, void *host)
{
    size_t low = 0, high = s->num_blocks;

    while (low < high) {
        size_t middle = (low + high) / 2;
        SnapshotBlock *b = &s->blocks[middle];

        if ((uint8_t *)host < b->source.host) {
            high = middle;
        } else if ((uint8_t *)host - b->source.host < b->source.size) {
            return b;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

static void wait_released(SnapshotRAM *s, SnapshotBlock *b, size_t unit)
{
    QEMU_LOCK_GUARD(&s->lock);

    qatomic_set(&s->waiters, s->waiters + 1);
    while (!unit_test(b->released, unit) && !qatomic_read(&s->stopped)) {
        qemu_cond_wait(&s->released_cond, &s->lock);
    }
    qatomic_set(&s->waiters, s->waiters - 1);
}

/* A fault comes.  That threads overwrite each other's average is no harm. */
static void note_fault(SnapshotRAM *s, int64_t now_ns)
{
    int64_t last_ns = stat64_get(&s->last_fault_ns);
    int64_t gap_ns = stat64_get(&s->fault_gap_ns);
    int64_t max_ns = s->config.busy_ns < INT64_MAX / MAX_GAP
                     ? s->config.busy_ns * MAX_GAP : s->config.busy_ns;

    if (last_ns) {
        gap_ns += (MIN(MAX(0, now_ns - last_ns), max_ns) - gap_ns) / AVERAGE_OF;
    } else {
        gap_ns = max_ns;
    }
    stat64_set(&s->fault_gap_ns, gap_ns);
}

static bool is_busy(SnapshotRAM *s)
{
    return s->config.busy_ns &&
           (int64_t)stat64_get(&s->fault_gap_ns) <= s->config.busy_ns;
}

/* What to save for a write to @unit, or to all from there to @end */
static Window write_window(SnapshotRAM *s, SnapshotBlock *b, size_t unit,
                           size_t end)
{
    bool busy = is_busy(s);
    size_t size = busy ? FAULT_AROUND_BUSY_SIZE : FAULT_AROUND_SIZE;
    size_t around = MAX(1, size / b->unit_size);
    size_t first = QEMU_ALIGN_DOWN(unit, around);
    size_t max = MAX_PAGES / b->unit_pages;
    size_t range = huge_range(s, b, unit);
    size_t left, right;

    if (qatomic_read(&s->islands) >= s->trap->max_islands) {
        /* No new island: go from the nearest one towards the unit */
        left = find_last_bit(b->released, unit);
        right = find_next_bit(b->released, b->num_units, unit + 1);
        if (left < unit &&
            (right == b->num_units || unit - left <= right - unit)) {
            return (Window) { left + 1, MIN(left + 1 + max, unit + 1),
                              KEEP_FIRST };
        }
        if (right < b->num_units) {
            return (Window) { MAX(right, unit + max) - max, right, KEEP_END };
        }
    }
    if (is_untouched(b, unit, unit + 2)) {
        /* It costs nothing: what is to be written, or a huge page of it */
        size_t zero = ram_source_zero_units(&b->source, unit);

        if (end > unit + 1) {
            return (Window) { unit, MIN(end, unit + zero), KEEP_ZERO };
        }
        if (b->num_huge && is_untouched(b, huge_first(s, b, range),
                                        huge_end(s, b, range))) {
            return (Window) { huge_first(s, b, range), huge_end(s, b, range),
                              KEEP_ZERO };
        }
    }
    if (busy && is_whole_huge(s, b, unit) &&
        stat64_get(&s->faults) % BUSY_WHOLE == 0) {
        return (Window) { huge_first(s, b, range), huge_end(s, b, range),
                          KEEP_UNIT };
    }
    end = MIN(QEMU_ALIGN_UP(end, around), first + max);
    return (Window) { first, MIN(end, b->num_units), KEEP_UNIT };
}

/* Make a window for @unit, up to @end, fit @n slots */
static void shrink_window(SnapshotBlock *b, Window *w, size_t unit, size_t end,
                          size_t n)
{
    size_t units = n / b->unit_pages;

    if (units >= w->end - w->first) {
        return;
    }
    switch (w->keep) {
    case KEEP_UNIT:
        w->first = unit;
        w->end = MIN(end, unit + units);
        break;
    case KEEP_FIRST:
        w->end = w->first + units;
        break;
    case KEEP_END:
        w->first = w->end - units;
        break;
    case KEEP_ZERO:
        /* One slot does for many, but may do for the unit alone as well */
        if (units < 2) {
            w->first = unit;
            w->end = unit + 1;
        }
        break;
    }
}

static void fail_impatient(SnapshotRAM *s, const Patience *patience)
{
    snapshot_ram_fail(s, patience->urgent ?
        "QEMU itself had to wait too long (more than a second, or than "
        "snapshot-stall-limit) for what it writes to guest RAM to be saved: "
        "the destination is too slow, snapshot-buffer-size too small, or a "
        "device's request too large" :
        "a guest write waited too long (see snapshot-stall-limit) for room in "
        "the page buffer: the destination is too slow, or snapshot-buffer-size "
        "too small");
}

/*
 * Have a unit saved, by whomever, and released; or the snapshot stopped.
 * Units from there to @end will be needed as well.
 */
static void save_for_write(SnapshotRAM *s, SnapshotBlock *b, size_t unit,
                           size_t end, Patience *patience)
{
    uint32_t slots[MAX_PAGES];

    while (!unit_test(b->released, unit) && !qatomic_read(&s->stopped)) {
        Window w = write_window(s, b, unit, end);
        size_t wanted = (w.end - w.first) * b->unit_pages;
        int64_t now_us = g_get_monotonic_time();
        bool waited = false;
        size_t n, used, saved;

        if (patience->urgent && now_us >= patience->deadline_us) {
            fail_impatient(s, patience);
            return;
        }
        if (unit_test(b->claimed, unit)) {
            wait_released(s, b, unit);
            return;
        }
        if (w.keep == KEEP_ZERO) {
            wanted = MAX(b->unit_pages, MIN(wanted, ZERO_SLOTS));
        }
        n = page_buffer_take(s->buffer, slots, b->unit_pages, wanted,
                             patience->urgent,
                             (now_us + patience->left_us) / 1000, &waited);
        if (waited) {
            stat64_add(&s->waits, 1);
            patience->left_us -= g_get_monotonic_time() - now_us;
        }
        if (!n) {
            if (!qatomic_read(&s->stopped)) {
                fail_impatient(s, patience);
            }
            return;
        }

        shrink_window(b, &w, unit, end, n);
        saved = w.keep == KEEP_ZERO
            ? snapshot_ram_save_zero(s, b, w.first, &w.end, slots, n, &used)
            : snapshot_ram_save_units(s, b, w.first, w.end, slots, &used);
        snapshot_ram_queue(s, slots, used, n);
        stat64_add(&s->fault_pages, saved);
        if (!saved && (w.keep == KEEP_FIRST || w.keep == KEEP_END)) {
            /* Somebody else is at it between us and the island */
            wait_released(s, b, w.keep == KEEP_FIRST ? w.first : w.end - 1);
        }
    }
}

/* How long a call may wait in all; to be given to end_patience() */
static Patience begin_patience(SnapshotRAM *s)
{
    int64_t now_us = g_get_monotonic_time();
    int64_t limit_us = s->config.stall_limit_ms * 1000LL;
    Patience p = {
        .urgent = s->config.urgent && s->config.urgent(),
        .given_us = limit_us,
        .deadline_us = now_us + s->config.urgent_call_ms * 1000LL,
    };

    if (p.urgent) {
        /* What was waited comes back at the rate at which time goes by */
        s->urgent_waited_us -= MIN(s->urgent_waited_us,
                                   now_us - s->urgent_since_us);
        s->urgent_since_us = now_us;
        p.given_us = MIN(limit_us, s->config.urgent_limit_ms * 1000LL -
                                   s->urgent_waited_us);
    }
    p.left_us = p.given_us;
    return p;
}

static void end_patience(SnapshotRAM *s, const Patience *p)
{
    if (p->urgent && p->left_us < p->given_us) {
        s->urgent_waited_us += p->given_us - p->left_us;
        s->urgent_since_us = g_get_monotonic_time();
    }
}

/*
 * A thread's fault on a unit that is released may come from before the release.
 * The access is tried again then.  It cannot have another such fault there
 * unless something was armed again: if it faults again, something else denies
 * the access.  The last unit is enough to know, for an access that faults for
 * ever does so at the same place.
 */
static bool fault_may_be_late(SnapshotRAM *s, void *unit)
{
    unsigned int number = qatomic_read(&s->number);

    if (late_fault.number == number && late_fault.unit == unit) {
        return false;
    }
    late_fault.number = number;
    late_fault.unit = unit;
    return true;
}

/* Had this thread too much of its time taken, in so long? */
static void check_stall_share(SnapshotRAM *s, int64_t ns)
{
    if (stall_window.stall_ns * 100.0 > (double)ns * s->config.stall_share) {
        snapshot_ram_fail(s, "guest writes waited for more of the time than "
                          "snapshot-stall-share allows: the destination is too "
                          "slow, or snapshot-buffer-size too small");
    }
}

static void begin_stall_window(SnapshotRAM *s, int64_t now_ns)
{
    stall_window.number = qatomic_read(&s->number);
    stall_window.start_ns = now_ns;
    stall_window.stall_ns = 0;
}

static void add_to_stall_share(SnapshotRAM *s, int64_t start_ns, int64_t end_ns)
{
    int64_t window_ns = s->config.stall_window_ms * (int64_t)SCALE_MS;

    if (stall_window.number != qatomic_read(&s->number)) {
        begin_stall_window(s, start_ns);
    } else if (start_ns - stall_window.start_ns >= window_ns) {
        check_stall_share(s, start_ns - stall_window.start_ns);
        begin_stall_window(s, start_ns);
    }
    stall_window.stall_ns += end_ns - start_ns;
    if (end_ns - stall_window.start_ns >= window_ns) {
        check_stall_share(s, end_ns - stall_window.start_ns);
        begin_stall_window(s, end_ns);
    }
}

static void count_stall(SnapshotRAM *s, int64_t start_ns, int64_t end_ns)
{
    int64_t ns = end_ns - start_ns;
    uint64_t us = ns / SCALE_US;
    int length = us ? 64 - clz64(us) : 0;

    stat64_add(&s->stalls[MIN(length, SNAPSHOT_RAM_STALL_LENGTHS - 1)], 1);
    stat64_add(&s->stall_ns, ns);
    stat64_max(&s->longest_stall_ns, ns);
    if (s->config.stall_share) {
        add_to_stall_share(s, start_ns, end_ns);
    }
}

bool snapshot_ram_fault(void *host, void *opaque)
{
    SnapshotRAM *s = opaque;
    SnapshotBlock *b = find_block(s, host);
    int64_t start_ns, end_ns;
    Patience patience;
    size_t unit;
    void *start;
    bool again;

    if (!b || !b->writable || qatomic_read(&snapshot_ram_copying)) {
        return false;
    }
    unit = ((uint8_t *)host - b->source.host) / b->unit_size;
    start = b->source.host + unit * b->unit_size;
    if (!qatomic_read(&s->armed) && !qatomic_read(&s->stopped) &&
        snapshot_ram_let_through(s, b, unit, unit + 1, false, &again)) {
        return !again || fault_may_be_late(s, start);
    }
    stat64_add(&s->faults, 1);
    if (unit_test(b->released, unit) || qatomic_read(&s->stopped)) {
        return fault_may_be_late(s, start);
    }
    start_ns = get_clock();
    note_fault(s, start_ns);
    patience = begin_patience(s);
    save_for_write(s, b, unit, unit + 1, &patience);
    end_patience(s, &patience);
    end_ns = get_clock();
    stat64_set(&s->last_fault_ns, end_ns);
    count_stall(s, start_ns, end_ns);
    return true;
}

void snapshot_ram_release(SnapshotRAM *s, void *host, size_t size)
{
    SnapshotBlock *b = find_block(s, host);
    size_t offset, unit, end;
    Patience patience;
    bool again;

    if (!b || !size) {
        return;
    }
    offset = (uint8_t *)host - b->source.host;
    end = MIN(DIV_ROUND_UP(offset + size, b->unit_size), b->num_units);
    if (!qatomic_read(&s->armed) &&
        snapshot_ram_let_through(s, b, offset / b->unit_size, end, true,
                                 &again)) {
        return;
    }
    patience = begin_patience(s);
    for (unit = offset / b->unit_size; unit < end; unit++) {
        unit = find_next_zero_bit(b->released, end, unit);
        if (unit < end) {
            save_for_write(s, b, unit, end, &patience);
        }
    }
    end_patience(s, &patience);
}

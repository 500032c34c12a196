/*
 * The RAM of a background snapshot: block table, claims and the one door
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/stats64.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "ram-source.h"
#include "snapshot-ram.h"
#include "trace.h"

/*
 * A write has this much around it saved and released as well, so that it is
 * not the first of many.  The smaller size takes hardly longer than a page.
 * The larger one is for guests that write so fast that they would be stopped
 * all the time: each write takes longer, but there are far fewer.
 */
#define FAULT_AROUND_SIZE (16 * KiB)
#define FAULT_AROUND_BUSY_SIZE (64 * KiB)

/* What the scanner saves and releases at a time */
#define SCAN_RUN_SIZE (1 * MiB)

/* The most that one thread saves at a time: a huge page of 2 MiB */
#define MAX_PAGES 512

typedef struct SnapshotBlock {
    SnapshotRAMBlock ram;
    RAMSource source;
    uint8_t *host;

    /* A unit is claimed and released as a whole: a page of the host */
    size_t unit_pages;
    size_t unit_size;
    size_t num_units;

    /* A bit for each unit, set by who saves it */
    unsigned long *claimed;

    /* A bit for each unit that may be written.  Set with the lock held. */
    unsigned long *released;
} SnapshotBlock;

struct SnapshotRAM {
    /* Do not change once the traps are armed */
    PageBuffer *buffer;
    size_t page_size;
    bool detect_zero;
    int64_t busy_ns;
    int stall_limit_ms;
    WriteTrap *trap;
    /* Sorted by host address */
    SnapshotBlock *blocks;
    size_t num_blocks;
    /* The first so many of them are armed, if they are writable */
    size_t num_armed;

    /* The scanner's own */
    size_t scan_block;
    size_t scan_unit;
    uint32_t scan_slots[MAX_PAGES];

    /* Protects the rest.  Nobody touches guest RAM while holding it. */
    QemuMutex lock;
    /* Signalled when units were released, if somebody waits, and at stop */
    QemuCond released_cond;
    /* Read without the lock as a hint */
    unsigned int waiters;
    /* Released ranges between armed ones; read without the lock as a hint */
    size_t islands;
    /* Read without the lock as well */
    bool stopped;
    const char *failure;

    /* When the last fault was handled */
    Stat64 last_fault_ns;

    Stat64 faults;
    Stat64 waits;
    Stat64 fault_pages;
    Stat64 scan_pages;
    Stat64 zero_pages;
};

/* A part of a block to save, and which side to keep if it must be smaller */
typedef struct Window {
    size_t first;
    size_t end;
    enum { KEEP_UNIT, KEEP_FIRST, KEEP_END } keep;
} Window;

SnapshotRAM *snapshot_ram_new(PageBuffer *buffer, size_t page_size,
                              bool detect_zero, int64_t busy_ns,
                              int stall_limit_ms)
{
    SnapshotRAM *s = g_new0(SnapshotRAM, 1);

    s->buffer = buffer;
    s->page_size = page_size;
    s->detect_zero = detect_zero;
    s->busy_ns = busy_ns;
    s->stall_limit_ms = stall_limit_ms;
    qemu_mutex_init(&s->lock);
    qemu_cond_init(&s->released_cond);
    return s;
}

void snapshot_ram_free(SnapshotRAM *s)
{
    size_t i;

    if (s->trap) {
        s->trap->ops->free(s->trap);
    }
    for (i = 0; i < s->num_blocks; i++) {
        ram_source_cleanup(&s->blocks[i].source);
        g_free(s->blocks[i].claimed);
        g_free(s->blocks[i].released);
    }
    g_free(s->blocks);
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
    b->ram = *block;
    b->source = (RAMSource) {
        .host = host,
        .shared = block->shared,
        .fd = block->fd,
        .fd_offset = block->fd_offset,
    };
    ram_source_init(&b->source);
    b->host = host;
    b->unit_pages = unit_pages;
    b->unit_size = unit_size;
    b->num_units = DIV_ROUND_UP(block->size, unit_size);
    b->claimed = bitmap_new(b->num_units);
    b->released = bitmap_new(b->num_units);
    return true;
}

/* Returns the block that holds @host, or NULL */
static SnapshotBlock *find_block(SnapshotRAM *s, void *host)
{
    size_t low = 0, high = s->num_blocks;

    while (low < high) {
        size_t middle = (low + high) / 2;
        SnapshotBlock *b = &s->blocks[middle];

        if ((uint8_t *)host < b->host) {
            high = middle;
        } else if ((uint8_t *)host - b->host < b->num_units * b->unit_size) {
            return b;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

static bool unit_test(const unsigned long *map, size_t unit)
{
    return qatomic_read(&map[BIT_WORD(unit)]) & BIT_MASK(unit);
}

static void fail(SnapshotRAM *s, const char *failure)
{
    /* The first reason is the one to tell */
    qatomic_cmpxchg(&s->failure, NULL, failure);
    snapshot_ram_stop(s);
}

/* Claim units of one word of the map.  Returns those that are the caller's. */
static unsigned long claim(SnapshotBlock *b, size_t first, size_t end)
{
    unsigned long *word = &b->claimed[BIT_WORD(first)];
    unsigned long mask = BITMAP_FIRST_WORD_MASK(first) &
                         BITMAP_LAST_WORD_MASK(end);

    return mask & ~qatomic_fetch_or(word, mask);
}

/* Copy a claimed unit.  Returns the number of slots used. */
static size_t copy_unit(SnapshotRAM *s, SnapshotBlock *b, size_t unit,
                        const uint32_t *slots)
{
    size_t page = unit * b->unit_pages;
    size_t end = MIN(page + b->unit_pages, b->ram.size / s->page_size);
    bool in_file = ram_source_in_file(&b->source, unit * b->unit_size);
    size_t used = 0;

    for (; page < end; page++) {
        size_t offset = page * s->page_size;
        PageBufferEntry *entry;
        uint8_t *data, *from;

        if (!test_bit(page, b->ram.save)) {
            continue;
        }
        entry = page_buffer_entry(s->buffer, slots[used]);
        entry->owner = b->ram.owner;
        entry->offset = offset;
        data = page_buffer_data(s->buffer, slots[used]);
        from = b->host + offset;
        if (in_file) {
            ram_source_read(&b->source, offset, data, s->page_size);
            from = data;
        }
        entry->zero = s->detect_zero && buffer_is_zero(from, s->page_size);
        if (entry->zero) {
            stat64_add(&s->zero_pages, 1);
        } else if (from != data) {
            memcpy(data, from, s->page_size);
        }
        used++;
    }
    return used;
}

static void release_units(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                          size_t end)
{
    size_t islands;
    int ret = 0;

    if (b->ram.writable) {
        ret = s->trap->ops->release(s->trap, b->host + first * b->unit_size,
                                    (end - first) * b->unit_size);
    }
    if (ret < 0) {
        fail(s, "a write trap could not be released");
        return;
    }

    QEMU_LOCK_GUARD(&s->lock);
    islands = s->islands + 1;
    islands -= first > 0 && unit_test(b->released, first - 1);
    islands -= end < b->num_units && unit_test(b->released, end);
    qatomic_set(&s->islands, islands);
    bitmap_set_atomic(b->released, first, end - first);
    if (s->waiters) {
        qemu_cond_broadcast(&s->released_cond);
    }
}

/*
 * The one door.  Of the units from @first to @end, claim those that nobody
 * has, copy, release and queue them.  There are slots for all; those that are
 * not used are given back.  Returns the number of pages saved.
 */
static size_t save_units(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                         size_t end, const uint32_t *slots, size_t num_slots)
{
    size_t unit = first, run = first, used = 0;

    while (unit < end) {
        size_t word_end = MIN(end, QEMU_ALIGN_UP(unit + 1, BITS_PER_LONG));
        unsigned long mine = claim(b, unit, word_end);

        for (; unit < word_end; unit++) {
            if (mine & BIT_MASK(unit)) {
                used += copy_unit(s, b, unit, slots + used);
                continue;
            }
            /* Somebody else's: may not be copied yet, so don't release it */
            if (run < unit) {
                release_units(s, b, run, unit);
            }
            run = unit + 1;
        }
        if (run < unit && qatomic_read(&s->waiters)) {
            /* Perhaps for one of these: better two short releases */
            release_units(s, b, run, unit);
            run = unit;
        }
    }
    if (run < end) {
        release_units(s, b, run, end);
    }

    page_buffer_queue(s->buffer, slots, used);
    page_buffer_give(s->buffer, slots + used, num_slots - used);
    return used;
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

/* What to save for a write to @unit */
static Window fault_window(SnapshotRAM *s, SnapshotBlock *b, size_t unit)
{
    int64_t pause_ns = get_clock() - stat64_get(&s->last_fault_ns);
    size_t size = pause_ns < s->busy_ns ? FAULT_AROUND_BUSY_SIZE
                                     : FAULT_AROUND_SIZE;
    size_t around = MAX(1, size / b->unit_size);
    size_t first = QEMU_ALIGN_DOWN(unit, around);
    size_t max = MAX_PAGES / b->unit_pages;
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
    return (Window) { first, MIN(first + around, b->num_units), KEEP_UNIT };
}

/* Have a unit saved, by whomever, and released; or the snapshot stopped */
static void release_unit(SnapshotRAM *s, SnapshotBlock *b, size_t unit)
{
    uint32_t slots[MAX_PAGES];

    while (!unit_test(b->released, unit) && !qatomic_read(&s->stopped)) {
        Window w = fault_window(s, b, unit);
        bool waited = false;
        size_t n, units, saved;

        if (unit_test(b->claimed, unit)) {
            wait_released(s, b, unit);
            return;
        }

        n = page_buffer_take(s->buffer, slots, b->unit_pages,
                             (w.end - w.first) * b->unit_pages,
                             s->stall_limit_ms, &waited);
        if (waited) {
            stat64_add(&s->waits, 1);
        }
        if (!n) {
            if (!qatomic_read(&s->stopped)) {
                fail(s, "a guest write waited too long for room in the page "
                     "buffer: the destination is too slow, or "
                     "snapshot-buffer-size too small");
            }
            return;
        }

        units = n / b->unit_pages;
        if (units < w.end - w.first) {
            switch (w.keep) {
            case KEEP_UNIT:
                w.first = unit;
                w.end = unit + 1;
                break;
            case KEEP_FIRST:
                w.end = w.first + units;
                break;
            case KEEP_END:
                w.first = w.end - units;
                break;
            }
        }
        saved = save_units(s, b, w.first, w.end, slots, n);
        stat64_add(&s->fault_pages, saved);
        if (!saved && w.keep != KEEP_UNIT) {
            /* Somebody else is at it between us and the island */
            wait_released(s, b, w.keep == KEEP_FIRST ? w.first : w.end - 1);
        }
    }
}

/* WriteTrapFaultFn */
static bool snapshot_ram_fault(void *host, void *opaque)
{
    SnapshotRAM *s = opaque;
    SnapshotBlock *b = find_block(s, host);

    if (!b || !b->ram.writable) {
        return false;
    }
    stat64_add(&s->faults, 1);
    release_unit(s, b, ((uint8_t *)host - b->host) / b->unit_size);
    stat64_set(&s->last_fault_ns, get_clock());
    return true;
}

void snapshot_ram_release(SnapshotRAM *s, void *host, size_t size)
{
    SnapshotBlock *b = find_block(s, host);
    size_t offset, unit, end;

    if (!b || !size) {
        return;
    }
    offset = (uint8_t *)host - b->host;
    end = MIN(DIV_ROUND_UP(offset + size, b->unit_size), b->num_units);
    for (unit = offset / b->unit_size; unit < end; unit++) {
        release_unit(s, b, unit);
    }
}

bool snapshot_ram_set_trap(SnapshotRAM *s, const WriteTrapOps *ops,
                           Error **errp)
{
    ERRP_GUARD();
    SnapshotBlock *last = &s->blocks[s->num_blocks - 1];
    uint8_t *start = s->blocks[0].host;
    size_t i;

    s->trap = ops->new(start,
                       last->host + last->num_units * last->unit_size - start,
                       snapshot_ram_fault, s, errp);
    if (!s->trap) {
        return false;
    }
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];
        size_t size = b->num_units * b->unit_size;

        if (!b->ram.writable) {
            continue;
        }
        if (!ops->add(s->trap, b->host, size, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->ram.name);
            return false;
        }
        if (!b->ram.shared) {
            ops->prepare(s->trap, b->host, size, b->ram.fd < 0);
        }
    }
    return true;
}

bool snapshot_ram_arm(SnapshotRAM *s, Error **errp)
{
    ERRP_GUARD();

    while (s->num_armed < s->num_blocks) {
        SnapshotBlock *b = &s->blocks[s->num_armed++];

        if (b->ram.writable &&
            !s->trap->ops->arm(s->trap, b->host, b->num_units * b->unit_size,
                               errp)) {
            error_prepend(errp, "RAM block '%s': ", b->ram.name);
            snapshot_ram_stop(s);
            return false;
        }
    }
    return true;
}

bool snapshot_ram_scan(SnapshotRAM *s)
{
    for (; !snapshot_ram_scan_done(s); s->scan_block++, s->scan_unit = 0) {
        SnapshotBlock *b = &s->blocks[s->scan_block];
        size_t run = MIN(SCAN_RUN_SIZE / b->unit_size,
                         MAX_PAGES / b->unit_pages);
        size_t first, end, n, saved;

        first = find_next_zero_bit(b->claimed, b->num_units, s->scan_unit);
        if (first == b->num_units) {
            continue;
        }
        end = MIN(first + MAX(run, 1), b->num_units);
        end = find_next_bit(b->claimed, end, first);

        n = page_buffer_try_take(s->buffer, s->scan_slots, b->unit_pages,
                                 (end - first) * b->unit_pages);
        if (!n) {
            return false;
        }
        end = first + n / b->unit_pages;
        saved = save_units(s, b, first, end, s->scan_slots, n);
        stat64_add(&s->scan_pages, saved);
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
        if (b->ram.writable) {
            ret = s->trap->ops->release(s->trap, b->host,
                                        b->num_units * b->unit_size);
        }
        if (ret < 0) {
            error_report("Cannot release write-protected guest RAM: %s",
                         strerror(-ret));
            abort();
        }
    }

    /* Only now: whoever sees this may write, also by a system call */
    qatomic_set(&s->stopped, true);
    page_buffer_stop(s->buffer);
    QEMU_LOCK_GUARD(&s->lock);
    qemu_cond_broadcast(&s->released_cond);
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
}

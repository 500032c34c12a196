/*
 * The RAM of a background snapshot: what its own files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * snapshot-ram.c: the table, and the end
 * snapshot-arm.c: the beginning: looks what exists, arms the trap
 * snapshot-ahead.c: most of that, while the VM still runs
 * snapshot-save.c: the one door, which all below go through
 * snapshot-fault.c: writes that have to wait for a copy
 * snapshot-scan.c: the scanner, and what to write next
 * snapshot-mend.c: huge pages
 */
#ifndef MIGRATION_SNAPSHOT_RAM_INTERNAL_H
#define MIGRATION_SNAPSHOT_RAM_INTERNAL_H

#include "qemu/bitmap.h"
#include "qemu/stats64.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "page-buffer.h"
#include "ram-source.h"
#include "snapshot-ram.h"

/* The most that one thread saves at a time: a huge page of 2 MiB */
#define MAX_PAGES SNAPSHOT_RAM_MAX_NEXT

/* Slots for what does not exist: one does, unless others claimed a part */
#define ZERO_SLOTS 64

typedef struct SnapshotBlock {
    /* See SnapshotBlockInfo */
    void *owner;
    char *name;
    size_t size;
    bool writable;
    const unsigned long *save;
    /* Where it is, and what of it exists */
    RAMSource source;

    /* A unit is claimed and released as a whole: a page of the host */
    size_t unit_pages;
    size_t unit_size;
    size_t num_units;

    /* A bit for each unit, set by who saves it */
    unsigned long *claimed;

    /* A bit for each unit that may be written.  Set with the lock held. */
    unsigned long *released;

    /*
     * Until snapshot_ram_arm(): a bit for each unit that is armed, and of which
     * is known that it exists, if it matters; and for each that may not be
     * armed yet, since somebody will write it whom the trap cannot stop.  Both
     * change with the lock held.  NULL if the block is not armed ahead.
     */
    unsigned long *armed;
    unsigned long *held;

    /*
     * The ranges where the host can have a huge page, the first of which
     * begins at or before its start.  0 if it can have none.
     */
    uint8_t *huge_host;
    size_t num_huge;
    /* A bit for each: it was one when the snapshot began */
    unsigned long *huge;
    /* A bit for each that was, and that was released in parts */
    unsigned long *split;
    /* A bit for each of these whose rest the scanner has not begun to save */
    unsigned long *rest;
    /* The mender's: a bit for each that could not be made huge again */
    unsigned long *failed;
} SnapshotBlock;

struct SnapshotRAM {
    /*
     * Tells it from all others that there have been; a new one each time that
     * something was armed
     */
    unsigned int number;
    /* Do not change once the traps are armed, but for snapshot_ram_close() */
    PageBuffer *buffer;
    SnapshotRAMConfig config;
    size_t page_size;
    size_t huge_size;
    /* Whether the host can make huge pages of split ones */
    bool can_mend;
    HostPages *pages;
    WriteTrap *trap;
    /* Sorted by host address */
    SnapshotBlock *blocks;
    size_t num_blocks;
    /* Protects how far the scanner is; taken before the buffer's lock */
    QemuMutex scan_lock;
    size_t scan_unit;
    /* Read without the lock as well */
    size_t scan_block;
    /*
     * How many bytes have been handed out that its bandwidth had not made up
     * for at debt_us, by g_get_monotonic_time()
     */
    double debt;
    int64_t debt_us;

    /* The mender's own */
    size_t mend_block;
    size_t mend_range;
    uint32_t mend_slots[MAX_PAGES];
    bool mending_rest;
    /* When there were no faults for the last time */
    int64_t mend_quiet_ns;
    /* Set when a huge page was split, and at stop */
    QemuEvent mend_event;

    /* Protects the rest.  Nobody touches guest RAM while holding it. */
    QemuMutex lock;
    /* Signalled when units were released, if somebody waits, and at stop */
    QemuCond released_cond;
    /* Read without the lock as a hint */
    unsigned int waiters;
    /* Until then, writes are let through.  Read without the lock as a hint. */
    bool armed;
    /* For how long a thread pauses whose write was let through; atomic */
    int slow_us;
    /* How many wait for the lock in order to let a write through; atomic */
    unsigned int waiting_writers;
    /* Nothing may be armed any more */
    bool stopping;
    /* The first so many blocks may be armed, if they are writable */
    size_t num_armed;
    /* Released ranges between armed ones; read without the lock as a hint */
    size_t islands;
    /* Read without the lock as well */
    bool stopped;
    const char *failure;

    /* How long urgent callers have waited, less what has come back since */
    int64_t urgent_waited_us;
    int64_t urgent_since_us;

    /* When the last fault was handled; 0: there was none */
    Stat64 last_fault_ns;
    /* How long after one another faults come, on an average of some */
    Stat64 fault_gap_ns;
    /* When somebody last asked what to write next */
    Stat64 last_next_ns;

    Stat64 let_through;
    Stat64 faults;
    Stat64 waits;
    Stat64 stall_ns;
    Stat64 longest_stall_ns;
    Stat64 stalls[SNAPSHOT_RAM_STALL_LENGTHS];
    Stat64 fault_pages;
    Stat64 scan_pages;
    Stat64 zero_pages;
    Stat64 untouched_pages;
    Stat64 huge_split;
    Stat64 huge_mended;
};

/* Tests a bit that others may set */
static inline bool unit_test(const unsigned long *map, size_t unit)
{
    return qatomic_read(&map[BIT_WORD(unit)]) & BIT_MASK(unit);
}

/* The units of a range where a huge page can be, as far as a block has them */
static inline size_t huge_first(const SnapshotRAM *s, const SnapshotBlock *b,
                                size_t range)
{
    uint8_t *host = b->huge_host + range * s->huge_size;

    return host > b->source.host ? (host - b->source.host) / b->unit_size : 0;
}

static inline size_t huge_end(const SnapshotRAM *s, const SnapshotBlock *b,
                              size_t range)
{
    return MIN(huge_first(s, b, range + 1), b->num_units);
}

/* In which of these ranges a unit is; 0 without any */
static inline size_t huge_range(const SnapshotRAM *s, const SnapshotBlock *b,
                                size_t unit)
{
    return b->num_huge ? (b->source.host + unit * b->unit_size - b->huge_host) /
                         s->huge_size : 0;
}

/* Is all of it private anonymous memory that does not exist?  Cheap. */
static inline bool is_untouched(const SnapshotBlock *b, size_t first,
                                size_t end)
{
    return b->source.exist && b->source.fd < 0 &&
           ram_source_zero_units(&b->source, first) >= end - first;
}

/* Is a unit in a huge page that nobody has split yet? */
static inline bool is_whole_huge(const SnapshotRAM *s, const SnapshotBlock *b,
                                 size_t unit)
{
    size_t range = huge_range(s, b, unit);

    return b->num_huge && test_bit(range, b->huge) &&
           !unit_test(b->split, range);
}

/* Something was armed: a fault can come again where one came late */
void snapshot_ram_renumber(SnapshotRAM *s);

/*
 * With the lock held.  Returns: whether anything may be armed, or false with
 * @errp set, as the snapshot is being stopped
 */
bool snapshot_ram_may_arm(SnapshotRAM *s, Error **errp);

/* Whether snapshot_ram_arm_ahead() is to see to a block */
bool snapshot_ram_can_arm_ahead(const SnapshotRAM *s, const SnapshotBlock *b);

/* What snapshot_ram_arm() has done */
typedef struct SnapshotArmWork {
    int64_t look_ns;
    int64_t arm_ns;
    /* How many calls to the trap */
    size_t ranges;
} SnapshotArmWork;

/*
 * Look at and arm what has not been of a block that was armed ahead.  With the
 * lock held, and nobody writes.
 */
bool snapshot_ram_arm_rest(SnapshotRAM *s, SnapshotBlock *b,
                           SnapshotArmWork *work, Error **errp);

/**
 * snapshot_ram_let_through: before snapshot_ram_arm(), allow a write
 *
 * Any thread.
 *
 * @first, @end: the units to be written
 * @hold: do not arm them before snapshot_ram_arm()
 * @again: is set to whether a write to @first was allowed already
 *
 * Returns: false if it is too late for that
 */
bool snapshot_ram_let_through(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                              size_t end, bool hold, bool *again);

/* End the snapshot because of an error; the first one is told */
void snapshot_ram_fail(SnapshotRAM *s, const char *failure);

/**
 * snapshot_ram_save_units: the one door
 *
 * Of the units from @first to @end, claim those that nobody has, copy and
 * release them.  There are slots for all.
 *
 * @num_used: is set to how many of the slots hold pages now
 *
 * Returns: the number of pages saved
 */
size_t snapshot_ram_save_units(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                               size_t end, const uint32_t *slots,
                               size_t *num_used);

/**
 * snapshot_ram_save_zero: the same for units that are known to be zeroes
 *
 * Ends early if the slots do not suffice for all entries.
 *
 * @end: is set to where it has ended
 *
 * Returns: the number of pages saved
 */
size_t snapshot_ram_save_zero(SnapshotRAM *s, SnapshotBlock *b, size_t first,
                              size_t *end, const uint32_t *slots,
                              size_t num_slots, size_t *num_used);

/* Queue the first @num_used of the slots, and give the others back */
void snapshot_ram_queue(SnapshotRAM *s, const uint32_t *slots, size_t num_used,
                        size_t num_slots);

/**
 * snapshot_ram_scan: save a run of pages that nobody has written yet
 *
 * The scanner's step.  Any number of threads.  Never waits.
 *
 * @pages: filled with the run, for snapshot_ram_written()
 * @num_pages: set to how many, which may be 0
 *
 * Returns: false if all pages are claimed or there is no room in the buffer
 */
bool snapshot_ram_scan(SnapshotRAM *s,
                       SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT],
                       size_t *num_pages);

/* Tell what is in slots that were dequeued or filled */
void snapshot_ram_fill_pages(SnapshotRAM *s, SnapshotPage *pages,
                             const uint32_t *slots, size_t n);

/**
 * snapshot_ram_queued: take pages that are queued, the oldest first
 *
 * @pages: as for snapshot_ram_next()
 * @wait: see page_buffer_dequeue()
 *
 * Returns: how many
 */
size_t snapshot_ram_queued(SnapshotRAM *s,
                           SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT],
                           bool wait);

/* Returns: whether the scanner has seen all pages */
bool snapshot_ram_scan_done(SnapshotRAM *s);

/* WriteTrapFaultFn */
bool snapshot_ram_fault(void *host, void *opaque);

/*
 * Whether this thread reads guest RAM to save it, which no trap stops: a fault
 * then is not the trap's
 */
extern __thread bool snapshot_ram_copying;

#endif

/*
 * The RAM of a background snapshot: block table, claims and the one door
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Every page leaves guest RAM the same way: it is claimed by exactly one
 * thread, copied into the page buffer, released from its write trap, and
 * queued for who writes the stream.  A writer's thread does that for the page
 * that it is about to write, the scanner for the pages that nobody has written.
 */
#ifndef MIGRATION_SNAPSHOT_RAM_H
#define MIGRATION_SNAPSHOT_RAM_H

#include "write-trap.h"

typedef struct SnapshotRAM SnapshotRAM;

/* A block of RAM to save */
typedef struct SnapshotBlockInfo {
    /* Is handed out with the block's pages */
    void *owner;
    /* For errors; is copied */
    const char *name;
    void *host;
    /* Bytes, a multiple of the page size */
    size_t size;
    /* In what pieces the host can protect the block's memory, in bytes */
    size_t host_page_size;
    /* false if the host lets nobody write to it, so that it needs no trap */
    bool writable;
    bool shared;
    /* The file that is mapped, or -1, and where in it.  Must stay open. */
    int fd;
    uint64_t fd_offset;
    /*
     * A bit for each page: whether it is part of the image.  Must stay until
     * snapshot_ram_close().
     */
    const unsigned long *save;
} SnapshotBlockInfo;

/* How many lengths of stalls are told apart, see SnapshotRAMStats */
#define SNAPSHOT_RAM_STALL_LENGTHS 43

typedef struct SnapshotRAMStats {
    uint64_t let_through;       /* writes before snapshot_ram_arm() */
    uint64_t faults;            /* writes that were stopped */
    uint64_t waits;             /* times that one waited for buffer room */
    size_t waiting;             /* threads that wait now, for that or a copy */
    uint64_t stall_ns;          /* how long all stopped writes took together */
    uint64_t longest_stall_ns;  /* and the longest one */
    /* How many took less than 1, 2, 4, ... us; the last one counts the rest */
    uint64_t stalls[SNAPSHOT_RAM_STALL_LENGTHS];
    uint64_t fault_pages;       /* pages saved for a write */
    uint64_t scan_pages;        /* pages saved by scanner and mender */
    uint64_t zero_pages;        /* of both, those that were all zeroes */
    uint64_t untouched_pages;   /* and of these, those that did not exist */
    uint64_t huge_split;        /* huge pages that were released in parts */
    uint64_t huge_mended;       /* of these, those that are huge again */
    size_t buffer_used;         /* pages that are in the buffer */
    size_t buffer_peak;         /* and the most that ever were */
} SnapshotRAMStats;

typedef struct SnapshotRAMConfig {
    /* Bytes, a power of two */
    size_t page_size;
    /* Bytes, at most, for copies of pages */
    size_t buffer_size;
    /* Called for each block's owner when the table is freed.  May be NULL. */
    void (*free_owner)(void *owner);
    /* Whether to look for pages that are all zeroes */
    bool detect_zero;
    /* Whether snapshot_ram_arm_ahead() may be called */
    bool arm_ahead;
    /*
     * How soon after one another faults must come, on an average of some, for
     * the guest to be writing fast: then more is saved at a time, and faults
     * are fewer.  0: it never is.
     */
    int64_t busy_ns;
    /*
     * How long there must have been no fault for the host to be asked for huge
     * pages
     */
    int64_t quiet_ns;
    /*
     * How long nobody who writes the image must have asked for more for the
     * mender to save what was split, which takes room and a CPU
     */
    int64_t stuck_ns;
    /*
     * How long a write, or one call to snapshot_ram_release(), may wait for
     * room in the buffer.  The snapshot fails rather than let it wait longer.
     */
    int stall_limit_ms;
    /*
     * How much of its time, in percent, a thread may spend on writes that were
     * stopped, on an average over so long or longer; 0: all of it.  The
     * snapshot fails rather than let it spend more.
     */
    unsigned int stall_share;
    int stall_window_ms;
    /*
     * Whether the calling thread holds something that many others need.  Of
     * such callers there is one at a time.  They get the last slots, and all
     * of them together may wait for urgent_limit_ms, which comes back to them
     * as time goes by; and no call of theirs goes on for longer than
     * urgent_call_ms, even if it never waits.  NULL: there are none.
     */
    bool (*urgent)(void);
    int urgent_limit_ms;
    int urgent_call_ms;
    /*
     * How many bytes of data to hand out in a second, as long as guest writes
     * do not ask for more; 0: as many as can be.  Any thread.  NULL: the same.
     */
    uint64_t (*bandwidth)(void);
} SnapshotRAMConfig;

/* Returns: an empty table, or NULL with @errp set */
SnapshotRAM *snapshot_ram_new(const SnapshotRAMConfig *config, Error **errp);

/**
 * snapshot_ram_check_page_size: can memory be saved that the host protects in
 * such pieces?
 *
 * @host_page_size, @page_size: bytes, of the host's pages and of the image's
 *
 * Returns: true, or false with @errp set
 */
bool snapshot_ram_check_page_size(size_t host_page_size, size_t page_size,
                                  Error **errp);

/**
 * snapshot_ram_add_block: add a block, before snapshot_ram_set_trap()
 *
 * Returns: true, or false with @errp set if the buffer is too small for this
 * block
 */
bool snapshot_ram_add_block(SnapshotRAM *s, const SnapshotBlockInfo *block,
                            Error **errp);

/* Call a function for the owner of each block */
void snapshot_ram_for_each_owner(SnapshotRAM *s,
                                 void (*fn)(void *owner, void *opaque),
                                 void *opaque);

/**
 * snapshot_ram_set_trap: get the blocks ready to be armed
 *
 * May take long; the memory can be written.
 *
 * Returns: true, or false with @errp set if the trap cannot serve them
 */
bool snapshot_ram_set_trap(SnapshotRAM *s, const WriteTrapOps *trap,
                           Error **errp);

/**
 * snapshot_ram_arm_ahead: have less to do for snapshot_ram_arm()
 *
 * After snapshot_ram_set_trap().  Arms most of the memory, while it is written:
 * the first write to each part of it is stopped and then let through.
 * Whom the trap cannot stop has to call snapshot_ram_release() before from now
 * on, also for what it has begun before and is still at.
 *
 * Returns: true, or false with @errp set; then nothing is armed
 */
bool snapshot_ram_arm_ahead(SnapshotRAM *s, Error **errp);

/**
 * snapshot_ram_arm: stop writes from now on, after snapshot_ram_set_trap()
 *
 * The memory's contents at this moment will be the image's.  Nothing must
 * write to it meanwhile, whatever snapshot_ram_release() was called for before.
 *
 * Returns: true, or false with @errp set; then nothing is armed
 */
bool snapshot_ram_arm(SnapshotRAM *s, Error **errp);

/**
 * snapshot_ram_release: let a range be written, after saving what it held
 *
 * For writers that the trap cannot stop, such as system calls, and before
 * memory is discarded.  Any thread, from snapshot_ram_set_trap() on; before
 * snapshot_ram_arm() there is nothing to save.
 * Ranges that are not in the table are passed over.
 */
void snapshot_ram_release(SnapshotRAM *s, void *host, size_t size);

/**
 * snapshot_ram_mend: have the host make a huge page whole again
 *
 * One that it had to split because only a part of it was released: saves the
 * rest, if there is room in the buffer, and asks the host.  Takes about a
 * millisecond, in which all the process's page faults may wait.  One thread at
 * a time, from snapshot_ram_arm() on, also after snapshot_ram_close().
 *
 * Returns: true if it has done something; false if there is nothing to do now
 */
bool snapshot_ram_mend(SnapshotRAM *s);

/**
 * snapshot_ram_mend_wait: wait until there may be something to mend
 *
 * Returns: false from snapshot_ram_stop() on, without waiting
 */
bool snapshot_ram_mend_wait(SnapshotRAM *s);

/**
 * snapshot_ram_mend_rest: get ready to mend what could not be mended before
 *
 * After snapshot_ram_close().
 *
 * Returns: how many huge pages are left to mend
 */
size_t snapshot_ram_mend_rest(SnapshotRAM *s);

/**
 * snapshot_ram_inherit: mend also what an earlier snapshot has left split
 *
 * After snapshot_ram_arm().  @from is closed, and nobody else uses it.
 */
void snapshot_ram_inherit(SnapshotRAM *s, const SnapshotRAM *from);

/* The most that snapshot_ram_next() hands out at a time */
#define SNAPSHOT_RAM_MAX_NEXT 512

/* A page to write to the image, or several that are all zeroes */
typedef struct SnapshotPage {
    /* From the block's SnapshotBlockInfo */
    void *owner;
    /* Bytes from the start of the block */
    uint64_t offset;
    /* NULL for zeroes */
    uint8_t *data;
    /* How many pages; one, if there is data */
    uint64_t num_pages;
    /* Private to the table */
    uint32_t slot;
} SnapshotPage;

/**
 * snapshot_ram_next: what to write to the image next
 *
 * First what was saved for guest writes, for that is in the buffer; else what
 * the scanner saves then; else waits for those who are at it.  Any number of
 * threads.
 *
 * @pages: is filled, pages that follow one another in order as far as can be;
 *         each @data stays until snapshot_ram_written()
 *
 * Returns: how many; 0 if all is saved, or after snapshot_ram_stop()
 */
size_t snapshot_ram_next(SnapshotRAM *s,
                         SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT]);

/* What snapshot_ram_next() has handed out is written, or lost */
void snapshot_ram_written(SnapshotRAM *s, const SnapshotPage *pages, size_t n);

/* After snapshot_ram_next() returned 0.  Returns: whether all is saved */
bool snapshot_ram_is_saved(SnapshotRAM *s);

/**
 * snapshot_ram_stop: lift all traps and wake all who wait
 *
 * Pages that were not saved are lost.  Any thread, any number of times.
 */
void snapshot_ram_stop(SnapshotRAM *s);

/* Returns: why the snapshot has stopped by itself, or NULL if it has not */
const char *snapshot_ram_failure(SnapshotRAM *s);

/* Before snapshot_ram_close(); any thread */
void snapshot_ram_get_stats(SnapshotRAM *s, SnapshotRAMStats *stats);

/* Those of huge pages only, also after that */
void snapshot_ram_get_mend_stats(SnapshotRAM *s, SnapshotRAMStats *stats);

/*
 * After snapshot_ram_stop(): give up the trap.  Nobody may use the buffer or
 * the table any more, but for snapshot_ram_mend().
 */
void snapshot_ram_close(SnapshotRAM *s);

/* The same, if need be, and free the table */
void snapshot_ram_free(SnapshotRAM *s);

#endif

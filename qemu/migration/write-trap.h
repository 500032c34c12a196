/*
 * Write traps: make the first write to a range of host memory stop
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * A trap knows addresses; it knows nothing of pages' meaning or of streams.
 */
#ifndef MIGRATION_WRITE_TRAP_H
#define MIGRATION_WRITE_TRAP_H

typedef struct WriteTrap WriteTrap;
typedef struct WriteTrapOps WriteTrapOps;

/**
 * WriteTrapFaultFn: a write to an armed range was stopped
 *
 * Called in the thread and context that the trap's ops tell.  It must have the
 * page released before it returns true.
 *
 * @host: the address to be written
 * @opaque: from write_trap_new()
 *
 * Returns: true if the write can be tried again, false if @host is in no
 * range of the owner's
 */
typedef bool WriteTrapFaultFn(void *host, void *opaque);

/* The common part of each trap's state; set by its new() */
struct WriteTrap {
    const WriteTrapOps *ops;

    /*
     * How many separate ranges may be released amid armed ones, for what the
     * host can bear; SIZE_MAX if it does not matter.  The owner counts them,
     * and beyond this many it releases next to what is released already.
     */
    size_t max_islands;
};

struct WriteTrapOps {
    const char *name;

    /**
     * @new: create the trap; no fault is delivered before arm()
     *
     * @start, @size: the span that holds all ranges that will be armed
     * @fault: called for each stopped write, until disarm() has returned
     *
     * Returns: the trap, or NULL with @errp set if the host does not allow it
     */
    WriteTrap *(*new)(void *start, size_t size, WriteTrapFaultFn *fault,
                      void *opaque, Error **errp);

    /**
     * @arm: stop writes to a range from now on.  One thread at a time.
     *
     * @host, @size: multiples of the memory's page size
     *
     * Returns: true, or false with @errp set; the range may be armed in part
     */
    bool (*arm)(WriteTrap *trap, void *host, size_t size, Error **errp);

    /**
     * @release: let writes to a part of an armed range through again
     *
     * Any thread, in @fault as well.
     *
     * Returns: 0, or -errno
     */
    int (*release)(WriteTrap *trap, void *host, size_t size);

    /**
     * @free: all ranges must have been released and nobody wait in @fault
     */
    void (*free)(WriteTrap *trap);
};

/* mprotect() and SIGSEGV; @fault runs in the writing thread's handler */
extern const WriteTrapOps write_trap_mprotect;

#endif

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
 * Called in the writing thread, in signal context, or in one of the trap's own
 * threads, as WriteTrapOps.in_thread tells; in several at a time.  It must have
 * the page released before it returns true.
 *
 * @host: the address to be written
 * @opaque: from write_trap_new()
 *
 * Returns: true if the write can be tried again, false if @host is in no
 * range of the owner's, or no trap is what denies the access
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

/*
 * new(), add(), prepare() and arm() are called by one thread at a time, in that
 * order.  Ranges are multiples of their memory's page size.
 */
struct WriteTrapOps {
    /* As in the QAPI enum SnapshotWriteTrap */
    const char *name;

    /*
     * The writing thread handles its own fault.  So the kernel's writes, which
     * are no thread's, fail: the owner releases beforehand what they write.
     */
    bool in_thread;

    /*
     * Private anonymous memory that does not exist is armed as well.  Without
     * that it can be written all the time, and it need not be released.
     */
    bool arms_untouched;

    /* Pages stay armed if the host merges them with others (KSM) */
    bool survives_merging;

    /*
     * The fault comes as SIGBUS: for as long as ranges are armed, each thread
     * that may write must be able to take it.
     */
    bool raises_sigbus;

    /**
     * @new: create the trap; no fault is delivered before arm()
     *
     * @start, @size: the span that holds all ranges that will be added
     * @fault: called for each stopped write, until free()
     *
     * Returns: the trap, or NULL with @errp set if the host does not allow it
     */
    WriteTrap *(*new)(void *start, size_t size, WriteTrapFaultFn *fault,
                      void *opaque, Error **errp);

    /**
     * @add: get a range ready to be armed; it can still be written
     *
     * Returns: true, or false with @errp set if the host cannot trap writes to
     * this kind of memory
     */
    bool (*add)(WriteTrap *trap, void *host, size_t size, Error **errp);

    /**
     * @prepare: do for an added range what should be done before arm().  It can
     * still be written.  Not for shared memory.  May be NULL.
     */
    void (*prepare)(WriteTrap *trap, void *host);

    /**
     * @arm: stop writes to an added range from now on
     *
     * Returns: true, or false with @errp set; the range may be armed in part
     */
    bool (*arm)(WriteTrap *trap, void *host, size_t size, Error **errp);

    /**
     * @release: let writes to a part of an armed range through again, and wake
     * who waits for it
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

/* To be called once for each trap, by migration_init() */
void write_trap_register(const WriteTrapOps *ops);

/* Returns: the trap of this name, or NULL if this build has none */
const WriteTrapOps *write_trap_find(const char *name);

#endif

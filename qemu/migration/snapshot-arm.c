/*
 * The RAM of a background snapshot: the beginning
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "snapshot-ram-internal.h"
#include "trace.h"

bool snapshot_ram_set_trap(SnapshotRAM *s, const WriteTrapOps *ops,
                           Error **errp)
{
    ERRP_GUARD();
    RAMSource *first = &s->blocks[0].source;
    RAMSource *last = &s->blocks[s->num_blocks - 1].source;
    size_t i;

    s->pages = host_pages_new(true, ops->arms_untouched ? NULL : errp);
    if (!s->pages && !ops->arms_untouched) {
        return false;
    }
    if (s->pages) {
        host_pages_prepare(s->pages);
    }
    s->trap = ops->new(first->host, last->host + last->size - first->host,
                       snapshot_ram_fault, s, errp);
    if (!s->trap) {
        return false;
    }
    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        ram_source_init(&b->source, s->pages);
        if (b->writable &&
            !ops->add(s->trap, b->source.host, b->source.size, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            return false;
        }
        if (b->writable && !b->source.shared && ops->prepare) {
            ops->prepare(s->trap, b->source.host);
        }
        if (snapshot_ram_can_arm_ahead(s, b)) {
            b->armed = bitmap_new(b->num_units);
            b->held = bitmap_new(b->num_units);
        }
        /* Of shared memory it is only about huge pages, and takes time */
        if (b->source.shared && !ram_source_look(&b->source, b->huge, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            return false;
        }
    }
    return true;
}

/* Look at all of a block, and arm it.  With the lock held. */
static bool arm_all(SnapshotRAM *s, SnapshotBlock *b, SnapshotArmWork *work,
                    Error **errp)
{
    int64_t start = get_clock(), looked;
    bool ok = b->source.shared ||
              ram_source_look(&b->source, b->huge, errp);

    looked = get_clock();
    work->look_ns += looked - start;
    if (ok && b->writable) {
        ok = s->trap->ops->arm(s->trap, b->source.host, b->source.size, errp);
        work->ranges++;
    }
    work->arm_ns += get_clock() - looked;
    return ok;
}

/* With the lock held, so that no write is let through at the same time */
static bool arm_blocks(SnapshotRAM *s, Error **errp)
{
    ERRP_GUARD();
    SnapshotArmWork work = {};
    size_t i;

    for (i = 0; i < s->num_blocks; i++) {
        SnapshotBlock *b = &s->blocks[i];

        s->num_armed = MAX(s->num_armed, i + 1);
        if (!(b->armed ? snapshot_ram_arm_rest(s, b, &work, errp)
                       : arm_all(s, b, &work, errp))) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            return false;
        }
    }
    trace_snapshot_ram_arm(work.look_ns / SCALE_US, work.arm_ns / SCALE_US,
                           work.ranges, stat64_get(&s->let_through));
    return true;
}

bool snapshot_ram_arm(SnapshotRAM *s, Error **errp)
{
    bool ok;

    WITH_QEMU_LOCK_GUARD(&s->lock) {
        ok = snapshot_ram_may_arm(s, errp) && arm_blocks(s, errp);
        s->islands = 0;
        snapshot_ram_renumber(s);
        qatomic_set(&s->armed, ok);
    }
    if (!ok) {
        snapshot_ram_stop(s);
    }
    return ok;
}

/*
 * The RAM of a background snapshot: the beginning
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "snapshot-ram-internal.h"

/* Find out what exists, of private memory just before it is armed */
static bool look(SnapshotRAM *s, SnapshotBlock *b, Error **errp)
{
    ERRP_GUARD();

    if (ram_source_look(&b->source, b->huge, errp)) {
        return true;
    }
    error_prepend(errp, "RAM block '%s': ", b->name);
    return false;
}

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
        /* Of shared memory it is only about huge pages, and takes time */
        if (b->source.shared && !look(s, b, errp)) {
            return false;
        }
    }
    return true;
}

bool snapshot_ram_arm(SnapshotRAM *s, Error **errp)
{
    ERRP_GUARD();

    while (s->num_armed < s->num_blocks) {
        SnapshotBlock *b = &s->blocks[s->num_armed++];
        bool ok = b->source.shared || look(s, b, errp);

        if (ok && b->writable &&
            !s->trap->ops->arm(s->trap, b->source.host, b->source.size, errp)) {
            error_prepend(errp, "RAM block '%s': ", b->name);
            ok = false;
        }
        if (!ok) {
            snapshot_ram_stop(s);
            return false;
        }
    }
    return true;
}

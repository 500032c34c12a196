/*
 * The VM's RAM blocks in the table of a background snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_BLOCKS_H
#define MIGRATION_SNAPSHOT_BLOCKS_H

#include "exec/ramblock.h"
#include "snapshot-ram.h"

/* The table's owner of a block's pages: the block as the stream announced it */
typedef struct SnapshotOwner {
    RAMBlock *block;
    /* Has a reference */
    MemoryRegion *mr;
    /* Its name, which the block loses if it is unplugged */
    char idstr[sizeof_field(RAMBlock, idstr)];
} SnapshotOwner;

/**
 * snapshot_blocks_add: fill a background snapshot's table
 *
 * With all RAM that the stream's setup section has announced.  To be called
 * before the BQL is let go after that: later a block's owner may be unplugged,
 * and then it is too late for a reference.
 *
 * Returns: true, or false with @errp set
 */
bool snapshot_blocks_add(SnapshotRAM *ram, Error **errp);

/* SnapshotRAMConfig.free_owner */
void snapshot_blocks_free(void *owner);

/*
 * From now on, RAM sections are of what @ram hands out; NULL: no more.  The
 * snapshot's thread.
 */
void snapshot_blocks_set(SnapshotRAM *ram);

/* Returns: what that has set.  The same thread. */
SnapshotRAM *snapshot_blocks_get(void);

#endif

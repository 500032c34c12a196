/*
 * The VM's RAM blocks in the table of a background snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "exec/memory.h"
#include "migration/misc.h"
#include "ram.h"
#include "snapshot-blocks.h"

static SnapshotRAM *section_ram;

bool snapshot_blocks_add(SnapshotRAM *ram, Error **errp)
{
    SnapshotBlockInfo info;
    SnapshotOwner *owner;
    RAMBlock *block;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(block) {
        if (!block->bmap) {
            continue;
        }
        memory_region_ref(block->mr);
        owner = g_new0(SnapshotOwner, 1);
        owner->block = block;
        owner->mr = block->mr;
        pstrcpy(owner->idstr, sizeof(owner->idstr), block->idstr);
        info = (SnapshotBlockInfo) {
            .owner = owner,
            .name = owner->idstr,
            .host = block->host,
            .size = block->used_length,
            .host_page_size = block->page_size,
            .writable = !(block->flags & RAM_READONLY),
            .shared = qemu_ram_is_shared(block),
            .fd = block->fd,
            .fd_offset = block->fd_offset,
            .save = block->bmap,
        };
        if (!snapshot_ram_add_block(ram, &info, errp)) {
            snapshot_blocks_free(owner);
            return false;
        }
    }
    return true;
}

void snapshot_blocks_free(void *opaque)
{
    SnapshotOwner *owner = opaque;

    BQL_LOCK_GUARD();
    memory_region_unref(owner->mr);
    g_free(owner);
}

void snapshot_blocks_set(SnapshotRAM *ram)
{
    section_ram = ram;
}

SnapshotRAM *snapshot_blocks_get(void)
{
    return section_ram;
}

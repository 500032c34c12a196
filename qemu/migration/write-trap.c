/*
 * Write traps: those that this build has
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "write-trap.h"

static const WriteTrapOps *write_traps[4];
static size_t num_write_traps;

void write_trap_register(const WriteTrapOps *ops)
{
    assert(num_write_traps < ARRAY_SIZE(write_traps));
    write_traps[num_write_traps++] = ops;
}

const WriteTrapOps *write_trap_find(const char *name)
{
    size_t i;

    for (i = 0; i < num_write_traps; i++) {
        if (g_str_equal(write_traps[i]->name, name)) {
            return write_traps[i];
        }
    }
    return NULL;
}

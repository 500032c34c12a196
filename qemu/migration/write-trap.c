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

void write_trap_register(const WriteTrapOps *ops)
{
    size_t i = 0;

    while (write_traps[i]) {
        assert(++i < ARRAY_SIZE(write_traps));
    }
    write_traps[i] = ops;
}

const WriteTrapOps *write_trap_find(const char *name)
{
    size_t i;

    for (i = 0; i < ARRAY_SIZE(write_traps) && write_traps[i]; i++) {
        if (g_str_equal(write_traps[i]->name, name)) {
            return write_traps[i];
        }
    }
    return NULL;
}

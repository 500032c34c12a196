/*
 * The write traps that there are, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "real-write-traps.h"

const WriteTrapOps *const real_traps[] = {
    &write_trap_mprotect,
#ifdef CONFIG_LINUX
    &write_trap_uffd_signal,
    &write_trap_uffd_thread,
#endif
    NULL
};

bool real_trap_available(const WriteTrapOps *ops, Error **errp)
{
    WriteTrap *trap = ops->new(NULL, 0, NULL, NULL, errp);

    if (trap) {
        ops->free(trap);
    }
    return trap;
}

void real_trap_skip(const void *ops)
{
    Error *err = NULL;

    g_assert_false(real_trap_available(ops, &err));
    g_test_skip(error_get_pretty(err));
    error_free(err);
}

/*
 * The write traps that there are, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef TESTS_REAL_WRITE_TRAPS_H
#define TESTS_REAL_WRITE_TRAPS_H

#include "../migration/write-trap.h"
#include "memory-kinds.h"

/* Returns: all that this build has; ends with NULL */
const WriteTrapOps *const *real_traps(void);

/* Returns: whether it is made of userfaultfd */
bool real_trap_is_uffd(const WriteTrapOps *ops);

/* Returns: false, with @errp set, if the host does not allow it */
bool real_trap_available(const WriteTrapOps *ops, Error **errp);

/* Returns: whether the kernel can do it, by what it says of itself */
bool real_trap_serves(const WriteTrapOps *ops, const MemoryKind *kind);

/* GTestDataFunc: the test of a trap that the host does not allow, says why */
void real_trap_skip(const void *ops);

/*
 * Add @prefix/TRAP/@name for each trap; where the host does not allow the trap,
 * it is skipped, and says why
 */
void real_traps_add_test(const char *prefix, const char *name,
                         GTestDataFunc fn);

#endif

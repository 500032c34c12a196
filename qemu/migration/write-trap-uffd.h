/*
 * Write traps made of userfaultfd write-protection: what they share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * They differ in how a stopped write is delivered.  None splits the host's
 * mappings.
 */
#ifndef MIGRATION_WRITE_TRAP_UFFD_H
#define MIGRATION_WRITE_TRAP_UFFD_H

#include "write-trap.h"

typedef struct UffdTrap {
    WriteTrap common;
    int fd;
} UffdTrap;

/**
 * uffd_trap_init: open a trap's userfaultfd
 *
 * @features: UFFD_FEATURE_*, besides what any such trap needs
 * @flags: for userfaultfd(2)
 *
 * Returns: true, or false with @errp set; then there is nothing to clean up
 */
bool uffd_trap_init(UffdTrap *trap, const WriteTrapOps *ops, uint64_t features,
                    int flags, Error **errp);
void uffd_trap_cleanup(UffdTrap *trap);

/* See WriteTrapOps */
bool uffd_trap_add(WriteTrap *common, void *host, size_t size, Error **errp);
bool uffd_trap_arm(WriteTrap *common, void *host, size_t size, Error **errp);
int uffd_trap_release(WriteTrap *common, void *host, size_t size);

#endif

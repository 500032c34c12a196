/*
 * Background snapshot: which VMs it can be taken of, and with which write trap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_CHOICE_H
#define MIGRATION_SNAPSHOT_CHOICE_H

#include "qapi/qapi-types-migration.h"
#include "write-trap.h"

/**
 * snapshot_choice_make: which write trap is right for this VM
 *
 * Obeys the parameter snapshot-write-trap.  Main thread, with the BQL held.
 *
 * @passed_over: set to a list of those that would have been better, and why
 *               they are not possible; for the caller to free.  May be NULL.
 *
 * Returns: the trap, or NULL with @errp saying what is in the way
 */
const WriteTrapOps *
snapshot_choice_make(SnapshotWriteTrapInfoList **passed_over, Error **errp);

/*
 * A snapshot with this trap begins, and has ended.  Main thread, with the BQL
 * held.
 */
void snapshot_choice_begin(const WriteTrapOps *ops);
void snapshot_choice_end(const WriteTrapOps *ops);

/* What is to be done for traps that are handled in the writing thread */
typedef struct InThreadTrapHooks {
    /* Returns: true, or false with @errp set if some writer cannot have them */
    bool (*check)(const WriteTrapOps *ops, Error **errp);
    void (*begin)(const WriteTrapOps *ops);
    void (*end)(const WriteTrapOps *ops);
} InThreadTrapHooks;

/* To be called, by migration_init(), if such traps are registered */
void snapshot_choice_set_in_thread_hooks(const InThreadTrapHooks *hooks);

/**
 * snapshot_choice_find_device: is there a device that is in the way?
 *
 * @types: QOM types; ends with NULL
 * @why: the rest of the sentence that begins with the device
 *
 * Returns: true if there is one, with @errp set
 */
bool snapshot_choice_find_device(const char *const *types, const char *why,
                                 Error **errp);

#endif

/*
 * Background snapshot: the sequence
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_BACKGROUND_SNAPSHOT_H
#define MIGRATION_BACKGROUND_SNAPSHOT_H

#include "migration.h"
#include "qapi/qapi-types-migration.h"
#include "snapshot-ram.h"

/**
 * background_snapshot_setup: get ready for a snapshot, before its destination
 * is opened
 *
 * Main thread, with the BQL held.
 *
 * Returns: true, or false with @errp saying what is in the way
 */
bool background_snapshot_setup(Error **errp);

/**
 * background_snapshot_start: start the migration thread of the snapshot
 *
 * Main thread.  The destination is open.
 *
 * @s: with a reference that the thread drops
 */
void background_snapshot_start(MigrationState *s);

/**
 * background_snapshot_channel: prepare the destination of a migration
 *
 * Returns: the channel to write to, with a new reference: @ioc itself unless
 * this is to be a background snapshot that must be able to end @ioc's writes
 */
QIOChannel *background_snapshot_channel(QIOChannel *ioc);

/**
 * background_snapshot_cancel: lift all traps at once
 *
 * Main thread.  Does nothing if no snapshot is active.
 */
void background_snapshot_cancel(void);

/**
 * background_snapshot_finish: tell how a snapshot ended
 *
 * Called by migration_cleanup() when the destination is closed, so that who
 * hears of the end finds the image whole and can start the next one.  BQL held.
 * Does nothing if the migration was no background snapshot.
 *
 * @ret: what closing the destination returned
 */
void background_snapshot_finish(MigrationState *s, int ret);

/* The beginning of the freeze, and the end of each of its parts */
typedef enum SnapshotFreezePart {
    SNAPSHOT_FREEZE_BEGIN,
    SNAPSHOT_FREEZE_STOP,
    SNAPSHOT_FREEZE_PAUSE,
    SNAPSHOT_FREEZE_DEVICES,
    SNAPSHOT_FREEZE_ARM,
    SNAPSHOT_FREEZE_RESUME,
    SNAPSHOT_FREEZE_PARTS,
} SnapshotFreezePart;

typedef struct SnapshotFigures {
    const WriteTrapOps *trap;
    /* Those that would have been better, but are not possible */
    SnapshotWriteTrapInfoList *passed_over;
    /* Bytes */
    uint64_t buffer_size;
    /* By g_get_monotonic_time(); 0: not yet */
    int64_t freeze_us[SNAPSHOT_FREEZE_PARTS];
    SnapshotRAMStats ram;
} SnapshotFigures;

/**
 * background_snapshot_figures: what a snapshot has done so far
 *
 * BQL held.
 *
 * Returns: the figures of the snapshot that is being taken, or of the last
 * migration if that was one, valid until the BQL is let go; else NULL
 */
const SnapshotFigures *background_snapshot_figures(void);

/* Forget the last one's: another migration begins.  BQL held. */
void background_snapshot_forget(void);

#endif

/*
 * Background snapshot: the threads that make split huge pages whole
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_MENDER_H
#define MIGRATION_SNAPSHOT_MENDER_H

#include "snapshot-ram.h"

/*
 * All are for the threads of snapshots, of which there is one at a time.
 */

/**
 * snapshot_mender_start: mend while pages are saved
 *
 * Also what the last snapshot has left.
 *
 * @ram: is armed
 */
void snapshot_mender_start(SnapshotRAM *ram);

/**
 * snapshot_mender_finish: mend the rest, and then free the table
 *
 * @ram: has stopped, and nobody else uses it.  It may not have been given to
 *       snapshot_mender_start(), or be NULL: then there is only what the last
 *       snapshot has left.
 */
void snapshot_mender_finish(SnapshotRAM *ram);

/*
 * Bring the figures of huge pages of the last snapshot up to date, of which
 * some may have been left to mend at its end.  Any thread.
 */
void snapshot_mender_get_stats(SnapshotRAMStats *stats);

/* Leave the last snapshot's huge pages as they are for now */
void snapshot_mender_pause(void);

#endif

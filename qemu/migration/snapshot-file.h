/*
 * The RAM of a background snapshot in places of a file
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * For mapped-ram, see docs/devel/migration/mapped-ram.rst.  With multifd, as
 * many threads as it has channels save and write at a time.
 */
#ifndef MIGRATION_SNAPSHOT_FILE_H
#define MIGRATION_SNAPSHOT_FILE_H

#include "snapshot-ram.h"

/**
 * snapshot_file_setup: open what the threads will write to
 *
 * With the BQL held, while the setup sections are written to @f.
 *
 * Returns: true, or false with @errp set; snapshot_file_cleanup() in any case
 */
bool snapshot_file_setup(QEMUFile *f, Error **errp);

/* With the BQL held.  Does nothing if there was no setup. */
void snapshot_file_cleanup(void);

/**
 * snapshot_file_save: write all RAM, then the bitmaps that say what is there
 *
 * As SaveVMHandlers.save_live_iterate: without the BQL.
 *
 * @f: the file, with the setup sections
 *
 * Returns: 1 if all RAM is saved; -errno if not, also if the snapshot was
 * stopped.  If it is the file's fault, the file has the error.
 */
int snapshot_file_save(SnapshotRAM *ram, QEMUFile *f);

#endif

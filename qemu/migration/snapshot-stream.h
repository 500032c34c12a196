/*
 * The RAM of a background snapshot as sections of a stream
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_STREAM_H
#define MIGRATION_SNAPSHOT_STREAM_H

#include "snapshot-ram.h"

/**
 * snapshot_stream_save: write what goes into one RAM section
 *
 * As SaveVMHandlers.save_live_iterate: without the BQL.
 *
 * Returns: 1 if all RAM is saved, 0 if there is more, or -errno
 */
int snapshot_stream_save(SnapshotRAM *ram, QEMUFile *f);

#endif

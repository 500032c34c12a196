/*
 * Background snapshot: its figures for users
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_FIGURES_H
#define MIGRATION_SNAPSHOT_FIGURES_H

#include "background-snapshot.h"

/* Tell that the moment of a snapshot has passed.  BQL held. */
void snapshot_figures_taken(const SnapshotFigures *figures);

/**
 * snapshot_figures_info: what query-migrate tells of a snapshot
 *
 * BQL held.
 *
 * Returns: figures for the caller to free; NULL if the migration is no
 * background snapshot
 */
BackgroundSnapshotInfo *snapshot_figures_info(void);

/* The same as text for humans */
void snapshot_figures_print(Monitor *mon, const BackgroundSnapshotInfo *info);

#endif

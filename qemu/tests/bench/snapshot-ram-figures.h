/*
 * Figures of snapshot-ram-bench: times, and how often locks are taken
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef TESTS_SNAPSHOT_RAM_FIGURES_H
#define TESTS_SNAPSHOT_RAM_FIGURES_H

#include "../migration/snapshot-ram.h"

/* Times by powers of two, in eighths of these */
#define STEPS 8

typedef struct Histogram {
    uint64_t count[64 * STEPS];
    uint64_t total;
    int64_t max;
} Histogram;

void histogram_add(Histogram *h, int64_t ns);
void histogram_merge(Histogram *h, const Histogram *from);
/* As a member of an object of JSON, not the first */
void histogram_print(const char *name, const Histogram *h);

/* Count what is done with a table's locks from now on; costs time */
void lock_counts_begin(SnapshotRAM *ram);
void lock_counts_end(void);
/* As members of an object of JSON, not the first */
void lock_counts_print(void);

#endif

/*
 * Helpers for tests of background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef BACKGROUND_SNAPSHOT_UTIL_H
#define BACKGROUND_SNAPSHOT_UTIL_H

#include "libqtest.h"
#include "migration/framework.h"
#include "qemu/units.h"

/* Page buffers for all that the guest writes to, and for next to nothing */
#define SNAPSHOT_LARGE_BUFFER (128 * MiB)
#define SNAPSHOT_SMALL_BUFFER (1 * MiB)

/* The image's file, which migrate_end() deletes, and its URI */
extern char *snapshot_image;
extern char *snapshot_image_uri;

void snapshot_set_up(MigrationTestEnv *env);

/* Returns: what the guest has written to the last of its pages */
uint8_t snapshot_last_byte(QTestState *who);

/* Wait until the guest has written to each of its pages, @n times at least */
void snapshot_wait_for_sweeps(QTestState *who, int n);

void snapshot_wait_for_status(QTestState *who, const char *goal);

/*
 * Start a source with the capability set, and a target, under TCG
 *
 * Returns: false if the test is skipped
 */
bool snapshot_start(QTestState **from, QTestState **to, const char *opts_source,
                    const char *opts_target);

/* Likewise, with more to choose, and without the capability */
bool snapshot_start_args(QTestState **from, QTestState **to,
                         MigrateStart *args);

/* Start a source that writes, and a target that stays paused when restored */
bool snapshot_start_running(QTestState **from, QTestState **to);

void snapshot_set_buffer_size(QTestState *who, uint64_t size);

/*
 * Give the source a destination "fd:sink" that takes nothing but what the test
 * reads from it.  A socket can be shut down by QEMU, a pipe cannot.
 */
int snapshot_open_sink(QTestState *from, bool is_pipe);

/* Start a snapshot of a VM that is to run, and wait until it runs again */
void snapshot_begin(QTestState *from, const char *uri);

/*
 * Returns: what query-migrate tells of the last snapshot, part of @rsp, which
 * the caller frees; NULL: nothing
 */
QDict *snapshot_query_figures(QTestState *who, QDict **rsp);

/* Assert that the snapshot has not ended */
void snapshot_assert_active(QTestState *from);

/*
 * Start a source that writes, and a snapshot of it to a sink
 *
 * Returns: the sink, or -1 if the test is skipped
 */
int snapshot_start_to_sink(QTestState **from, QTestState **to,
                           uint64_t buffer_size, bool is_pipe);

/* Read the image from the sink to its end, pausing after each 64 KiB */
void snapshot_read_sink(int sink, int pause_us);

/* Restore the image into a @status VM, and check it before it runs on */
void snapshot_restore(QTestState *to, const char *status);

/* End the source, which has the disk locked that the target needs to run */
void snapshot_quit_source(QTestState *from);

/* See source and target run on; end both */
void snapshot_finish(QTestState *from, QTestState *to);

/* Likewise, after restoring the image of a VM that was to run */
void snapshot_restore_and_finish(QTestState *from, QTestState *to);

/*
 * Returns: the names of all write traps, in the order in which auto tries them.
 * The caller frees it.
 */
char **snapshot_list_traps(QTestState *who);

/*
 * Returns: what query-snapshot-write-traps says is in the way of @trap, or NULL
 * if it is available.  The caller frees it.
 */
char *snapshot_trap_reason(QTestState *who, const char *trap);

/* Returns: the first available trap, or NULL.  The caller frees it. */
char *snapshot_first_trap(QTestState *who);

/* Assert that a command was refused with an error that tells @why; free it */
void snapshot_assert_error(QDict *error, const char *why);

/* Assert that snapshots cannot be started, or the capability not be set */
void snapshot_assert_migrate_fails(QTestState *who, const char *why);
void snapshot_assert_capability_fails(QTestState *who, const char *why);

#endif

/*
 * Background snapshot: the threads that make split huge pages whole
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/rcu.h"
#include "qemu/stats64.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "migration.h"
#include "snapshot-mender.h"
#include "trace.h"

/* How long huge pages are not mended at most, and how often that is tried */
#define MAX_PAUSE_US 20000
#define TRIES 3

/* While pages are saved */
static struct {
    QemuThread thread;
    bool stop;
    SnapshotRAM *ram;
} mender;

/* After that, until all are mended or the next snapshot begins */
static struct {
    QemuThread thread;
    bool started;
    bool stop;
    /* What it is at, or has left; its own until it is joined */
    SnapshotRAM *ram;
    /* Of the last snapshot, also while there is nothing left to do */
    Stat64 num_split;
    Stat64 num_mended;
} late_mender;

static void publish(SnapshotRAM *ram)
{
    SnapshotRAMStats stats;

    snapshot_ram_get_mend_stats(ram, &stats);
    stat64_set(&late_mender.num_split, stats.huge_split);
    stat64_set(&late_mender.num_mended, stats.huge_mended);
}

void snapshot_mender_get_stats(SnapshotRAMStats *stats)
{
    stats->huge_mended = MAX(stats->huge_mended,
                             stat64_get(&late_mender.num_mended));
    stats->huge_split = MAX(stats->huge_split,
                            stat64_get(&late_mender.num_split));
}

/* Mend a huge page, and pause half as long as that took */
static bool mend(SnapshotRAM *ram)
{
    int64_t start = get_clock();
    bool done = snapshot_ram_mend(ram);

    if (done) {
        g_usleep(MIN((get_clock() - start) / SCALE_US / 2, MAX_PAUSE_US));
    }
    return done;
}

static void *mender_thread(void *opaque)
{
    SnapshotRAM *ram = opaque;

    rcu_register_thread();
    if (late_mender.ram) {
        /*
         * Here, since this takes the BQL: who has it may wait for the
         * snapshot's thread
         */
        snapshot_ram_inherit(ram, late_mender.ram);
        snapshot_ram_free(late_mender.ram);
        late_mender.ram = NULL;
    }
    do {
        while (!qatomic_read(&mender.stop) && mend(ram)) {
            ;
        }
    } while (snapshot_ram_mend_wait(ram));
    rcu_unregister_thread();
    return NULL;
}

void snapshot_mender_start(SnapshotRAM *ram)
{
    mender.ram = ram;
    mender.stop = false;
    qemu_thread_create(&mender.thread, MIGRATION_THREAD_MENDER, mender_thread,
                       ram, QEMU_THREAD_JOINABLE);
}

static void *late_mender_thread(void *opaque)
{
    SnapshotRAM *ram = opaque;
    size_t left = snapshot_ram_mend_rest(ram);
    int tries;

    rcu_register_thread();
    for (tries = 0; left && tries < TRIES; tries++) {
        while (!qatomic_read(&late_mender.stop) && mend(ram)) {
            publish(ram);
        }
        left = snapshot_ram_mend_rest(ram);
    }
    trace_background_snapshot_mended(left);
    if (!left || !qatomic_read(&late_mender.stop)) {
        snapshot_ram_free(ram);
        late_mender.ram = NULL;
    }
    rcu_unregister_thread();
    return NULL;
}

void snapshot_mender_finish(SnapshotRAM *ram)
{
    if (mender.ram) {
        /* What is left is for the other one */
        qatomic_set(&mender.stop, true);
        qemu_thread_join(&mender.thread);
        mender.ram = NULL;
        publish(ram);
        snapshot_ram_close(ram);
        late_mender.ram = ram;
    } else if (ram) {
        /* It was never armed, so it has split nothing */
        snapshot_ram_free(ram);
    }
    if (late_mender.ram) {
        late_mender.stop = false;
        late_mender.started = true;
        qemu_thread_create(&late_mender.thread, MIGRATION_THREAD_MENDER,
                           late_mender_thread, late_mender.ram,
                           QEMU_THREAD_JOINABLE);
    }
}

void snapshot_mender_pause(void)
{
    if (late_mender.started) {
        qatomic_set(&late_mender.stop, true);
        qemu_thread_join(&late_mender.thread);
        late_mender.started = false;
    }
    stat64_set(&late_mender.num_split, 0);
    stat64_set(&late_mender.num_mended, 0);
}

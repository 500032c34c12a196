/*
 * Background snapshot: the sequence
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * The VM stops, its devices are saved to memory, its RAM is write-protected,
 * the VM resumes; then RAM is written to the stream, and the devices' state
 * behind it.  See docs/devel/migration/background-snapshot.rst.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "qemu/memory-fault.h"
#include "io/channel-buffer.h"
#include "migration/global_state.h"
#include "migration/misc.h"
#include "migration/snapshot-hooks.h"
#include "system/runstate.h"
#include "background-snapshot.h"
#include "migration-stats.h"
#include "options.h"
#include "qemu-file.h"
#include "ram.h"
#include "savevm.h"
#include "snapshot-channel.h"
#include "snapshot-ram.h"
#include "trace.h"

/* Pages written to the stream at a time */
#define DRAIN_PAGES 256

/* How long one section of the stream goes on, as for any migration of RAM */
#define MAX_SECTION_MS 50

/* A guest whose writes are stopped this soon after one another writes fast */
#define BUSY_NS (100 * SCALE_US)

/* A guest gives up on itself sooner: Linux warns of a soft lockup after 20 s */
#define STALL_LIMIT_MS (10 * 1000)

/* Chosen in the main thread, before the snapshot's thread starts */
static const WriteTrapOps *snapshot_trap;

typedef struct BackgroundSnapshot {
    PageBuffer *buffer;
    SnapshotRAM *ram;
    /* What @ram holds references to */
    GPtrArray *regions;
} BackgroundSnapshot;

/* Set by the snapshot's thread while traps are armed; others need RCU. */
static BackgroundSnapshot *current_snapshot;

bool background_snapshot_armed;

/* With the BQL held: must RAM stay as it is being got ready? */
static bool snapshot_preparing;

/* With the BQL held: resume the VM in the main loop? */
static bool snapshot_resume;

/* With the BQL held: has the thread ended, and nobody been told? */
static bool snapshot_ended;

static bool not_cancelled(void)
{
    return migrate_get_current()->state == MIGRATION_STATUS_ACTIVE;
}

bool background_snapshot_active(void)
{
    return current_snapshot;
}

QIOChannel *background_snapshot_channel(QIOChannel *ioc)
{
    if (migrate_background_snapshot()) {
        return snapshot_channel_new(ioc);
    }
    return QIO_CHANNEL(object_ref(OBJECT(ioc)));
}

void background_snapshot_release(void *host, size_t size)
{
    BackgroundSnapshot *bs;

    RCU_READ_LOCK_GUARD();
    bs = qatomic_rcu_read(&current_snapshot);
    if (bs) {
        snapshot_ram_release(bs->ram, host, size);
    }
}

bool background_snapshot_may_discard(void)
{
    return !snapshot_preparing;
}

void background_snapshot_release_iov(QEMUIOVector *qiov, size_t offset,
                                     size_t size)
{
    size_t head, tail;
    int i, n;
    struct iovec *iov = qemu_iovec_slice(qiov, offset, size, &head, &tail, &n);

    /* The parts at the ends will be written as well, or the read fails */
    for (i = 0; i < n; i++) {
        background_snapshot_release(iov[i].iov_base, iov[i].iov_len);
    }
}

void background_snapshot_cancel(void)
{
    BackgroundSnapshot *bs;

    RCU_READ_LOCK_GUARD();
    bs = qatomic_rcu_read(&current_snapshot);
    if (bs) {
        snapshot_ram_stop(bs->ram);
    }
}

/* Fill the table with all RAM that the stream's setup section announced */
static bool background_snapshot_add_blocks(BackgroundSnapshot *bs,
                                           Error **errp)
{
    SnapshotRAMBlock ram;
    RAMBlock *block;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(block) {
        if (!block->bmap) {
            continue;
        }
        memory_region_ref(block->mr);
        g_ptr_array_add(bs->regions, block->mr);
        ram = (SnapshotRAMBlock) {
            .owner = block,
            .name = block->idstr,
            .host = block->host,
            .size = block->used_length,
            .host_page_size = block->page_size,
            .writable = !(block->flags & RAM_READONLY),
            .shared = qemu_ram_is_shared(block),
            .fd = block->fd,
            .fd_offset = block->fd_offset,
            .save = block->bmap,
        };
        if (!snapshot_ram_add_block(bs->ram, &ram, errp)) {
            return false;
        }
    }
    return true;
}

/* Get all ready that can be while the VM runs.  It may take long. */
static bool background_snapshot_prepare(BackgroundSnapshot *bs, Error **errp)
{
    if (!ram_bytes_total()) {
        error_setg(errp, "The VM has no RAM to save");
        return false;
    }
    bs->buffer = page_buffer_new(migrate_snapshot_buffer_size(),
                                 qemu_target_page_size(), errp);
    if (!bs->buffer) {
        return false;
    }
    bs->ram = snapshot_ram_new(bs->buffer, qemu_target_page_size(),
                               migrate_zero_page_detection() !=
                               ZERO_PAGE_DETECTION_NONE,
                               BUSY_NS, STALL_LIMIT_MS);
    return background_snapshot_add_blocks(bs, errp) &&
           snapshot_ram_set_trap(bs->ram, snapshot_trap, errp);
}

/* Arm all write traps.  The VM is stopped. */
static bool background_snapshot_arm(BackgroundSnapshot *bs, Error **errp)
{
    if (!snapshot_ram_arm(bs->ram, errp)) {
        return false;
    }
    trace_background_snapshot_armed(snapshot_trap->name,
                                    page_buffer_num_slots(bs->buffer));
    qatomic_rcu_set(&current_snapshot, bs);
    qatomic_set(&background_snapshot_armed, snapshot_trap->in_thread);
    return true;
}

/* Lift all write traps and forget them */
static void background_snapshot_disarm(BackgroundSnapshot *bs)
{
    SnapshotRAMStats stats;

    snapshot_ram_stop(bs->ram);
    qatomic_set(&background_snapshot_armed, false);
    qatomic_rcu_set(&current_snapshot, NULL);
    synchronize_rcu();

    snapshot_ram_get_stats(bs->ram, &stats);
    trace_background_snapshot_end(stats.scan_pages, stats.fault_pages,
                                  stats.zero_pages, stats.faults, stats.waits,
                                  page_buffer_peak(bs->buffer));
}

static void background_snapshot_free(BackgroundSnapshot *bs)
{
    size_t i;

    if (background_snapshot_active()) {
        background_snapshot_disarm(bs);
    }
    if (bs->ram) {
        snapshot_ram_free(bs->ram);
    }
    if (bs->buffer) {
        page_buffer_free(bs->buffer);
    }
    bql_lock();
    for (i = 0; i < bs->regions->len; i++) {
        memory_region_unref(g_ptr_array_index(bs->regions, i));
    }
    bql_unlock();
    g_ptr_array_free(bs->regions, true);
    g_free(bs);
}

static void background_snapshot_resume_bh(void *opaque)
{
    MigrationState *s = opaque;

    if (snapshot_resume && runstate_check(RUN_STATE_PAUSED)) {
        vm_start();
    }
    migration_downtime_end(s);
    /* Zero would mean that it has not ended yet */
    s->downtime = MAX(s->downtime, 1);
    trace_background_snapshot_resume(s->downtime);
}

/*
 * Stop the VM, save its devices to @fb, arm the write traps.  Has the VM
 * resume, and returns true, or false with @errp set.
 */
static bool background_snapshot_freeze(MigrationState *s, QEMUFile *fb,
                                       BackgroundSnapshot *bs, Error **errp)
{
    RunState old_state = runstate_get();
    bool live = runstate_is_live(old_state);
    int ret;

    trace_background_snapshot_freeze(RunState_str(old_state));

    ret = migration_stop_vm(s, live ? RUN_STATE_PAUSED : old_state);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot stop the VM");
        goto fail;
    }

    /* The user has paused the VM for the snapshot: both copies will run */
    snapshot_resume = live || old_state == RUN_STATE_PAUSED;
    if (old_state == RUN_STATE_PAUSED) {
        global_state_store_running();
    }

    ret = qemu_savevm_state_complete_precopy_non_iterable(fb, false);
    if (ret == 0) {
        ret = qemu_fflush(fb);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot save the state of the devices");
        goto fail;
    }
    trace_background_snapshot_saved_devices(s->bioc->usage);

    if (!background_snapshot_arm(bs, errp)) {
        goto fail;
    }

    /* In the main loop: devices expect it there, and may write guest RAM */
    migration_bh_schedule(background_snapshot_resume_bh, s);
    return true;

fail:
    if (live) {
        vm_resume(old_state);
    }
    return false;
}

int background_snapshot_save_ram(QEMUFile *f)
{
    int64_t start = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    SnapshotRAM *ram = current_snapshot->ram;
    PageBuffer *buffer = current_snapshot->buffer;
    uint32_t slots[DRAIN_PAGES];
    size_t i, n;
    int ret = 0;

    do {
        page_buffer_warm(buffer);
        n = page_buffer_dequeue(buffer, slots, DRAIN_PAGES, false);
        if (!n) {
            /* Guest writes came first; now there is time for the scanner */
            if (snapshot_ram_scan(ram)) {
                continue;
            }
            n = page_buffer_dequeue(buffer, slots, DRAIN_PAGES, true);
        }
        if (!n && snapshot_ram_failure(ram)) {
            return -EIO;
        }
        if (!n && snapshot_ram_scan_done(ram)) {
            return 1;
        }

        for (i = 0; i < n; i++) {
            PageBufferEntry *entry = page_buffer_entry(buffer, slots[i]);

            ram_save_page_copy(f, entry->owner, entry->offset,
                               entry->zero ? NULL :
                               page_buffer_data(buffer, slots[i]));
        }
        ret = qemu_fflush(f);
        page_buffer_give(buffer, slots, n);
    } while (ret == 0 && not_cancelled() &&
             qemu_clock_get_ms(QEMU_CLOCK_REALTIME) < start + MAX_SECTION_MS);

    return ret;
}

/* Write all of the image but the header and the setup sections */
static bool background_snapshot_save(MigrationState *s, Error **errp)
{
    ERRP_GUARD();
    QEMUFile *f = s->to_dst_file;
    const char *failure;
    int ret = 0;

    while (not_cancelled() && ret == 0) {
        ret = qemu_savevm_state_iterate(f, false);
        migration_rate_limit();
    }
    if (ret > 0) {
        trace_background_snapshot_saved_ram();
        qemu_put_buffer(f, s->bioc->data, s->bioc->usage);
        qemu_fflush(f);
    }

    failure = snapshot_ram_failure(current_snapshot->ram);
    if (failure) {
        error_setg(errp, "Background snapshot failed: %s", failure);
        return false;
    }
    ret = qemu_file_get_error_obj(f, errp);
    if (ret < 0 && !*errp) {
        error_setg_errno(errp, -ret, "Cannot write the image");
    }
    return ret == 0;
}

static void *background_snapshot_thread(void *opaque)
{
    MigrationState *s = opaque;
    BackgroundSnapshot *bs = g_new0(BackgroundSnapshot, 1);
    int64_t setup_start = qemu_clock_get_ms(QEMU_CLOCK_HOST);
    QEMUFile *fb;
    Error *err = NULL;
    bool ok;

    rcu_register_thread();
    bs->regions = g_ptr_array_new();

    migration_rate_set(RATE_LIMIT_DISABLED);
    update_iteration_initial_status(s);

    /* Devices are saved first, but stand at the end of the stream */
    s->bioc = qio_channel_buffer_new(512 * KiB);
    qio_channel_set_name(QIO_CHANNEL(s->bioc), "vmstate-buffer");
    fb = qemu_file_new_output(QIO_CHANNEL(s->bioc));
    object_unref(OBJECT(s->bioc));

    if (s->rdma_migration) {
        error_setg(&err, "Background-snapshot is not possible over RDMA");
        ok = false;
    } else {
        bql_lock();
        snapshot_preparing = true;
        qemu_savevm_state_header(s->to_dst_file);
        ok = qemu_savevm_state_setup(s->to_dst_file, &err) == 0;
        bql_unlock();
    }

    qemu_savevm_wait_unplug(s, MIGRATION_STATUS_SETUP,
                            MIGRATION_STATUS_ACTIVE);
    s->setup_time = qemu_clock_get_ms(QEMU_CLOCK_HOST) - setup_start;

    ok = ok && background_snapshot_prepare(bs, &err);
    if (ok && not_cancelled()) {
        bql_lock();
        ok = background_snapshot_freeze(s, fb, bs, &err);
        snapshot_preparing = false;
        bql_unlock();
        ok = ok && background_snapshot_save(s, &err);
    }
    background_snapshot_free(bs);

    if (!ok && not_cancelled()) {
        if (!err) {
            error_setg(&err, "Cannot save the VM");
        }
        migrate_set_error(s, err);
    }
    error_free(err);

    bql_lock();
    snapshot_preparing = false;
    snapshot_ended = true;
    migration_bh_schedule(migration_cleanup_bh, s);
    bql_unlock();

    qemu_fclose(fb);
    object_unref(OBJECT(s));
    rcu_unregister_thread();
    return NULL;
}

bool background_snapshot_setup(Error **errp)
{
    snapshot_trap = background_snapshot_choose_trap(errp);
    return snapshot_trap;
}

void background_snapshot_start(MigrationState *s)
{
    if (snapshot_trap->raises_sigbus) {
        memory_fault_allow_sigbus(true);
    }
    qemu_thread_create(&s->thread, MIGRATION_THREAD_SNAPSHOT,
                       background_snapshot_thread, s, QEMU_THREAD_JOINABLE);
}

void background_snapshot_finish(MigrationState *s, int ret)
{
    if (!snapshot_ended) {
        return;
    }
    snapshot_ended = false;
    if (snapshot_trap->raises_sigbus) {
        memory_fault_allow_sigbus(false);
    }

    if (s->state == MIGRATION_STATUS_CANCELLING) {
        return;
    }
    if (ret < 0 && !migrate_has_error(s)) {
        Error *err = NULL;

        error_setg(&err, "Cannot close the image: the destination failed");
        migrate_set_error(s, err);
        error_free(err);
    }
    if (migrate_has_error(s)) {
        migrate_set_state(&s->state, s->state, MIGRATION_STATUS_FAILED);
    } else {
        /* It takes the lock itself */
        bql_unlock();
        migration_completion_end(s);
        bql_lock();
    }
}

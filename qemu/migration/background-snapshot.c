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
#include "qemu/cutils.h"
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
#include "memory-room.h"
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

/* How long huge pages are not mended at most, and how often that is tried */
#define MAX_MEND_PAUSE_US 20000
#define MEND_TRIES 3

/* A guest gives up on itself sooner: Linux warns of a soft lockup after 20 s */
#define STALL_LIMIT_MS (10 * 1000)

/* The monitor and all devices wait for who holds the BQL */
#define BQL_STALL_LIMIT_MS 1000

/* Chosen in the main thread, before the snapshot's thread starts */
static const WriteTrapOps *snapshot_trap;

/* A RAM block that is saved, as it was when the stream began */
typedef struct SavedBlock {
    RAMBlock *block;
    /* Has a reference */
    MemoryRegion *mr;
    char idstr[sizeof_field(RAMBlock, idstr)];
} SavedBlock;

typedef struct BackgroundSnapshot {
    PageBuffer *buffer;
    SnapshotRAM *ram;
    /* SavedBlock, what @ram refers to */
    GPtrArray *blocks;
    /* Mends huge pages while traps are armed */
    QemuThread mender;
} BackgroundSnapshot;

/* Mends huge pages after a snapshot; for the threads of snapshots */
static struct {
    QemuThread thread;
    bool started;
    bool stop;
    /* What it could not finish, when it is not at it */
    BackgroundSnapshot *left;
} late_mender;

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

static void background_snapshot_free(BackgroundSnapshot *bs)
{
    size_t i;

    if (bs->ram) {
        snapshot_ram_free(bs->ram);
    }
    if (bs->buffer) {
        page_buffer_free(bs->buffer);
    }
    BQL_LOCK_GUARD();
    for (i = 0; i < bs->blocks->len; i++) {
        SavedBlock *saved = g_ptr_array_index(bs->blocks, i);

        memory_region_unref(saved->mr);
    }
    g_ptr_array_free(bs->blocks, true);
    g_free(bs);
}

/* Mend a huge page, and pause half as long as that took */
static bool background_snapshot_mend(BackgroundSnapshot *bs)
{
    int64_t start = get_clock();
    bool done = snapshot_ram_mend(bs->ram);

    if (done) {
        g_usleep(MIN((get_clock() - start) / SCALE_US / 2,
                     MAX_MEND_PAUSE_US));
    }
    return done;
}

/* While pages are saved */
static void *background_snapshot_mender(void *opaque)
{
    BackgroundSnapshot *bs = opaque;

    do {
        while (background_snapshot_mend(bs)) {
            ;
        }
    } while (snapshot_ram_mend_wait(bs->ram));
    return NULL;
}

/* After that, until all are mended or the next snapshot begins */
static void *background_snapshot_late_mender(void *opaque)
{
    BackgroundSnapshot *bs = opaque;
    size_t left = snapshot_ram_mend_rest(bs->ram);
    int tries;

    rcu_register_thread();
    for (tries = 0; left && tries < MEND_TRIES; tries++) {
        while (!qatomic_read(&late_mender.stop) &&
               background_snapshot_mend(bs)) {
            ;
        }
        left = snapshot_ram_mend_rest(bs->ram);
    }
    trace_background_snapshot_mended(left);
    if (qatomic_read(&late_mender.stop) && left) {
        late_mender.left = bs;
    } else {
        background_snapshot_free(bs);
    }
    rcu_unregister_thread();
    return NULL;
}

static void background_snapshot_start_late_mender(BackgroundSnapshot *bs)
{
    late_mender.left = NULL;
    late_mender.stop = false;
    late_mender.started = true;
    qemu_thread_create(&late_mender.thread, MIGRATION_THREAD_MENDER,
                       background_snapshot_late_mender, bs,
                       QEMU_THREAD_JOINABLE);
}

/* Have the last snapshot's huge pages be left as they are for now */
static void background_snapshot_stop_late_mender(void)
{
    if (late_mender.started) {
        qatomic_set(&late_mender.stop, true);
        qemu_thread_join(&late_mender.thread);
        late_mender.started = false;
    }
}

/* The VM is resumed already, as it need not wait for this */
static void background_snapshot_start_mender(BackgroundSnapshot *bs)
{
    qemu_thread_create(&bs->mender, MIGRATION_THREAD_MENDER,
                       background_snapshot_mender, bs, QEMU_THREAD_JOINABLE);
    if (late_mender.left) {
        snapshot_ram_inherit(bs->ram, late_mender.left->ram);
        background_snapshot_free(late_mender.left);
        late_mender.left = NULL;
    }
}

/*
 * Fill the table with all RAM that the stream's setup section announced, before
 * the BQL is let go: after that a block's owner may be unplugged, and then it
 * is too late for a reference.
 */
static bool background_snapshot_add_blocks(BackgroundSnapshot *bs,
                                           Error **errp)
{
    SnapshotRAMBlock ram;
    SavedBlock *saved;
    RAMBlock *block;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(block) {
        if (!block->bmap) {
            continue;
        }
        memory_region_ref(block->mr);
        saved = g_new0(SavedBlock, 1);
        saved->block = block;
        saved->mr = block->mr;
        pstrcpy(saved->idstr, sizeof(saved->idstr), block->idstr);
        g_ptr_array_add(bs->blocks, saved);
        ram = (SnapshotRAMBlock) {
            .owner = saved,
            .name = saved->idstr,
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
    uint64_t size = migrate_snapshot_buffer_size();
    uint64_t room = memory_room();

    if (!ram_bytes_total()) {
        error_setg(errp, "The VM has no RAM to save");
        return false;
    }
    background_snapshot_stop_late_mender();
    if (size > room) {
        error_setg(errp, "snapshot-buffer-size is %" PRIu64 " MiB, but QEMU's "
                   "memory cgroups leave room for %" PRIu64 " MiB: set a "
                   "smaller size, or raise their limits", size / MiB,
                   room / MiB);
        return false;
    }
    bs->buffer = page_buffer_new(size, qemu_target_page_size(), errp);
    if (!bs->buffer) {
        return false;
    }
    bs->ram = snapshot_ram_new(bs->buffer, &(SnapshotRAMConfig) {
        .page_size = qemu_target_page_size(),
        .detect_zero = migrate_zero_page_detection() !=
                       ZERO_PAGE_DETECTION_NONE,
        .busy_ns = BUSY_NS,
        .stall_limit_ms = STALL_LIMIT_MS,
        .urgent = bql_locked,
        .urgent_limit_ms = BQL_STALL_LIMIT_MS,
    });
    return true;
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
                                  stats.zero_pages, stats.untouched_pages,
                                  stats.faults, stats.waits,
                                  page_buffer_peak(bs->buffer));
    trace_background_snapshot_huge_pages(stats.huge_split, stats.huge_mended);
}

/* Free what a snapshot holds, after its huge pages are mended */
static void background_snapshot_end(BackgroundSnapshot *bs)
{
    if (!background_snapshot_active()) {
        background_snapshot_free(bs);
        if (late_mender.left) {
            background_snapshot_start_late_mender(late_mender.left);
        }
        return;
    }
    background_snapshot_disarm(bs);
    qemu_thread_join(&bs->mender);
    snapshot_ram_close(bs->ram);
    page_buffer_free(bs->buffer);
    bs->buffer = NULL;
    background_snapshot_start_late_mender(bs);
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
            SavedBlock *saved = entry->owner;

            if (entry->zero_pages) {
                ram_save_zero_pages(f, saved->block, saved->idstr,
                                    entry->offset, entry->zero_pages);
            } else {
                ram_save_page_copy(f, saved->block, saved->idstr,
                                   entry->offset,
                                   page_buffer_data(buffer, slots[i]));
            }
        }
        ret = qemu_fflush(f);
        page_buffer_give(buffer, slots, n);
    } while (ret == 0 && not_cancelled() &&
             qemu_clock_get_ms(QEMU_CLOCK_REALTIME) < start + MAX_SECTION_MS);

    return ret;
}

static bool background_snapshot_check_file(QEMUFile *f, Error **errp)
{
    ERRP_GUARD();
    int ret = qemu_file_get_error_obj(f, errp);

    if (ret < 0 && !*errp) {
        error_setg_errno(errp, -ret, "Cannot write the image");
    }
    return ret == 0;
}

/*
 * Write the header and the setup sections.  They go through the buffer @fb,
 * since the destination may take its time, and that without the BQL.
 */
static bool background_snapshot_save_setup(MigrationState *s, QEMUFile *fb,
                                           BackgroundSnapshot *bs,
                                           Error **errp)
{
    bool ok;

    bql_lock();
    qemu_savevm_state_header(fb);
    ok = qemu_savevm_state_setup(fb, errp) == 0 &&
         background_snapshot_add_blocks(bs, errp);
    bql_unlock();
    if (!ok) {
        return false;
    }

    qemu_fflush(fb);
    qemu_put_buffer(s->to_dst_file, s->bioc->data, s->bioc->usage);
    qemu_fflush(s->to_dst_file);
    s->bioc->usage = s->bioc->offset = 0;
    return background_snapshot_check_file(s->to_dst_file, errp);
}

/* Write all of the image but the header and the setup sections */
static bool background_snapshot_save(MigrationState *s, Error **errp)
{
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
    return background_snapshot_check_file(f, errp);
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
    bs->blocks = g_ptr_array_new_with_free_func(g_free);

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
        ok = background_snapshot_prepare(bs, &err) &&
             background_snapshot_save_setup(s, fb, bs, &err);
    }

    qemu_savevm_wait_unplug(s, MIGRATION_STATUS_SETUP,
                            MIGRATION_STATUS_ACTIVE);
    s->setup_time = qemu_clock_get_ms(QEMU_CLOCK_HOST) - setup_start;

    bql_lock();
    snapshot_preparing = true;
    bql_unlock();
    ok = ok && snapshot_ram_set_trap(bs->ram, snapshot_trap, &err);
    if (ok) {
        bql_lock();
        /* With the BQL nobody cancels: what is frozen will be resumed */
        ok = not_cancelled() && background_snapshot_freeze(s, fb, bs, &err);
        snapshot_preparing = false;
        bql_unlock();
        if (ok) {
            background_snapshot_start_mender(bs);
            ok = background_snapshot_save(s, &err);
        }
    }
    background_snapshot_end(bs);

    if (!ok && !err) {
        error_setg(&err, "Cannot save the VM");
    }
    /*
     * Here, as what takes the image may go on for long after its end.  The VM
     * runs meanwhile, and the user can cancel.
     */
    ok = snapshot_channel_finish(qemu_file_get_ioc(s->to_dst_file),
                                 ok && not_cancelled(), ok ? &err : NULL) &&
         ok;
    if (!ok && not_cancelled()) {
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

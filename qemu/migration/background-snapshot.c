/*
 * Background snapshot: the sequence
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Most RAM is write-protected.  The VM stops, its devices are saved to memory,
 * the rest of its RAM is protected, the VM resumes; then RAM is written to the
 * stream, and the devices' state behind it.  See
 * docs/devel/migration/background-snapshot.rst.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "block/block.h"
#include "exec/memory.h"
#include "exec/target_page.h"
#include "io/channel-buffer.h"
#include "migration/global_state.h"
#include "migration/misc.h"
#include "migration/snapshot-hooks.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "background-snapshot.h"
#include "memory-room.h"
#include "migration-stats.h"
#include "options.h"
#include "qemu-file.h"
#include "ram.h"
#include "savevm.h"
#include "snapshot-blocks.h"
#include "snapshot-channel.h"
#include "snapshot-choice.h"
#include "snapshot-figures.h"
#include "snapshot-mender.h"
#include "snapshot-ram.h"
#include "trace.h"

/* A guest whose writes are stopped this soon after one another writes fast */
#define BUSY_NS (100 * SCALE_US)

/* To make a huge page takes the host a millisecond, and some if it is short */
#define QUIET_NS (10 * SCALE_MS)

/*
 * A destination that takes so long is slow.  To write 2 MiB into the page cache
 * may take 10 ms, where the host itself has to get the memory from somebody.
 */
#define STUCK_NS (50 * SCALE_MS)

/* How long snapshot-stall-share is an average of */
#define STALL_WINDOW_MS (10 * 1000)

/* The monitor and all devices wait for who holds the BQL */
#define BQL_STALL_LIMIT_MS 1000
#define BQL_CALL_LIMIT_MS (10 * 1000)

typedef enum SnapshotStage {
    SNAPSHOT_NONE,
    /* Its thread is at it */
    SNAPSHOT_STARTED,
    /* Its thread has ended, and nobody been told */
    SNAPSHOT_ENDED,
} SnapshotStage;

/* There is one snapshot at a time */
static struct {
    /* Protected by the BQL */
    SnapshotStage stage;
    /* Whether the user had paused the VM when it began */
    bool was_paused;
    /* Whether to resume the VM in the main loop */
    bool resume;
    /*
     * Of the one that is being taken, or of the last one, if there is a trap.
     * Those of RAM come from @figures_ram if that is not NULL.
     */
    SnapshotFigures figures;
    SnapshotRAM *figures_ram;

    /* Chosen by the main thread before there is another */
    const WriteTrapOps *trap;
    SnapshotWriteTrapInfoList *passed_over;

    /* The thread's own */
    SnapshotRAM *ram;

    /* The same while traps may be armed; for others, see use_armed() */
    SnapshotRAM *armed;
    /* How many of them use it; atomic */
    unsigned int users;
} snapshot;

static bool not_cancelled(void)
{
    return migrate_get_current()->state == MIGRATION_STATUS_ACTIVE;
}

QIOChannel *background_snapshot_channel(QIOChannel *ioc)
{
    if (migrate_background_snapshot()) {
        return snapshot_channel_new(ioc);
    }
    return QIO_CHANNEL(object_ref(OBJECT(ioc)));
}

static void unuse_armed(void)
{
    qatomic_dec(&snapshot.users);
}

/*
 * Returns: the RAM that may be armed, until unuse_armed(); or NULL.
 *
 * This is not done by RCU, which not all threads that come here have told of
 * themselves, and in which nobody should wait for long.
 */
static SnapshotRAM *use_armed(void)
{
    SnapshotRAM *ram;

    if (!qatomic_read(&snapshot.armed)) {
        return NULL;
    }
    /* Full barrier, pairs with forget_armed() */
    qatomic_inc(&snapshot.users);
    ram = qatomic_read(&snapshot.armed);
    if (!ram) {
        unuse_armed();
    }
    return ram;
}

/* Nobody may have to wait any more: it is stopped */
static void forget_armed(void)
{
    qatomic_set(&snapshot.armed, NULL);
    /* Before looking for users, who count before they look */
    smp_mb();
    while (qatomic_read(&snapshot.users)) {
        g_usleep(10);
    }
}

void background_snapshot_release(void *host, size_t size)
{
    SnapshotRAM *ram = use_armed();

    if (ram) {
        snapshot_ram_release(ram, host, size);
        unuse_armed();
    }
}

void background_snapshot_cancel(void)
{
    SnapshotRAM *ram = use_armed();

    if (ram) {
        snapshot_ram_stop(ram);
        unuse_armed();
    }
}

/* What KVM writes of its own accord is told just before vCPUs start, or lost */
static bool background_snapshot_arms_ahead(void)
{
    return !(kvm_enabled() && snapshot.trap->in_thread);
}

/* Milliseconds.  Who waits for longer than the window gets no share of it. */
static int background_snapshot_stall_limit(void)
{
    int limit_ms = migrate_snapshot_stall_limit() ?: INT_MAX;

    return migrate_snapshot_stall_share() ? MIN(limit_ms, STALL_WINDOW_MS)
                                          : limit_ms;
}

/* Get all ready that can be while the VM runs.  It may take long. */
static bool background_snapshot_prepare(Error **errp)
{
    uint64_t size = migrate_snapshot_buffer_size();
    uint64_t room = memory_room();

    if (!ram_bytes_total()) {
        error_setg(errp, "The VM has no RAM to save");
        return false;
    }
    if (size > room) {
        error_setg(errp, "snapshot-buffer-size is %" PRIu64 " MiB, but QEMU's "
                   "memory cgroups leave room for %" PRIu64 " MiB: set a "
                   "smaller size, or raise their limits", size / MiB,
                   room / MiB);
        return false;
    }
    bql_lock();
    snapshot.figures.buffer_size = size;
    bql_unlock();
    snapshot.ram = snapshot_ram_new(&(SnapshotRAMConfig) {
        .page_size = qemu_target_page_size(),
        .buffer_size = size,
        .free_owner = snapshot_blocks_free,
        .detect_zero = migrate_zero_page_detection() !=
                       ZERO_PAGE_DETECTION_NONE,
        .arm_ahead = background_snapshot_arms_ahead(),
        .busy_ns = BUSY_NS,
        .quiet_ns = QUIET_NS,
        .stuck_ns = STUCK_NS,
        .stall_limit_ms = background_snapshot_stall_limit(),
        .stall_share = migrate_snapshot_stall_share(),
        .stall_window_ms = STALL_WINDOW_MS,
        .urgent = bql_locked,
        .urgent_limit_ms = BQL_STALL_LIMIT_MS,
        .urgent_call_ms = BQL_CALL_LIMIT_MS,
        .bandwidth = migrate_snapshot_bandwidth,
    }, errp);
    return snapshot.ram;
}

/* Arm what can be while the VM runs, and have others tell what they write */
static bool background_snapshot_arm_ahead(Error **errp)
{
    bool arms = background_snapshot_arms_ahead();
    bool drain = arms && snapshot.trap->in_thread;

    int i;

    bql_lock();
    if (!not_cancelled()) {
        /* Before there was something to stop */
        bql_unlock();
        return false;
    }
    qatomic_set(&snapshot.armed, snapshot.ram);
    snapshot.figures_ram = snapshot.ram;
    /*
     * A disk may be being read into memory that nobody has told of; and a
     * request to do so may be queued until it is drained
     */
    for (i = 0; drain && i < 2; i++) {
        bdrv_drain_all();
    }
    bql_unlock();

    return !arms || snapshot_ram_arm_ahead(snapshot.ram, errp);
}

/* Arm all write traps.  The VM is stopped. */
static bool background_snapshot_arm(Error **errp)
{
    if (!snapshot_ram_arm(snapshot.ram, errp)) {
        return false;
    }
    trace_background_snapshot_armed(snapshot.trap->name);
    snapshot_blocks_set(snapshot.ram);
    return true;
}

/* Lift all write traps and forget them */
static void background_snapshot_disarm(void)
{
    snapshot_blocks_set(NULL);
    snapshot_ram_stop(snapshot.ram);
    forget_armed();

    BQL_LOCK_GUARD();
    snapshot_ram_get_stats(snapshot.ram, &snapshot.figures.ram);
    /* What was not written is lost */
    snapshot.figures.ram.buffer_used = 0;
    snapshot.figures_ram = NULL;
}

const SnapshotFigures *background_snapshot_figures(void)
{
    SnapshotFigures *figures = &snapshot.figures;

    if (!figures->trap) {
        return NULL;
    }
    if (snapshot.figures_ram) {
        snapshot_ram_get_stats(snapshot.figures_ram, &figures->ram);
    } else if (figures->freeze_us[SNAPSHOT_FREEZE_RESUME]) {
        /* That goes on after the end */
        snapshot_mender_get_stats(&figures->ram);
    }
    return figures;
}

void background_snapshot_forget(void)
{
    qapi_free_SnapshotWriteTrapInfoList(snapshot.figures.passed_over);
    snapshot.figures = (SnapshotFigures) {};
}

/* A part of the freeze has ended */
static void background_snapshot_note(SnapshotFreezePart part)
{
    snapshot.figures.freeze_us[part] = g_get_monotonic_time();
}

static void background_snapshot_resume_bh(void *opaque)
{
    MigrationState *s = opaque;

    /* Whoever has reset it meanwhile did not mean to stop it */
    if (snapshot.resume && (runstate_check(RUN_STATE_PAUSED) ||
                            runstate_check(RUN_STATE_PRELAUNCH))) {
        vm_start();
    }
    background_snapshot_note(SNAPSHOT_FREEZE_RESUME);
    migration_downtime_end(s);
    /* Zero would mean that it has not ended yet */
    s->downtime = MAX(s->downtime, 1);
    snapshot_figures_taken(&snapshot.figures);
}

static void background_snapshot_see_run(void *opaque, bool running,
                                        RunState state)
{
    bool *has_run = opaque;

    *has_run |= running;
}

/*
 * Let the user do what belongs to the same moment, such as snapshots of disks,
 * if that is asked for.  The VM is stopped; it waits without the BQL.
 */
static bool background_snapshot_wait_for_user(MigrationState *s, Error **errp)
{
    VMChangeStateEntry *entry;
    bool has_run = false;
    bool ok = true;

    if (migrate_pause_before_switchover()) {
        entry = qemu_add_vm_change_state_handler(background_snapshot_see_run,
                                                 &has_run);
        ok = migration_switchover_prepare(s);
        qemu_del_vm_change_state_handler(entry);
        migrate_set_state(&s->state, MIGRATION_STATUS_DEVICE,
                          MIGRATION_STATUS_ACTIVE);
        if (!ok) {
            error_setg(errp, "Cancelled while the VM stood still");
        } else if (has_run) {
            error_setg(errp, "The VM was resumed before migrate-continue");
            ok = false;
        }
    }
    background_snapshot_note(SNAPSHOT_FREEZE_PAUSE);
    return ok;
}

/*
 * Stop the VM, save its devices to @fb, arm the write traps.  Has the VM
 * resume, and returns true, or false with @errp set.
 */
static bool background_snapshot_freeze(MigrationState *s, QEMUFile *fb,
                                       Error **errp)
{
    RunState old_state = runstate_get();
    bool live = runstate_is_live(old_state);
    int ret;

    trace_background_snapshot_freeze(RunState_str(old_state));

    background_snapshot_note(SNAPSHOT_FREEZE_BEGIN);
    ret = migration_stop_vm(s, live ? RUN_STATE_PAUSED : old_state);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot stop the VM");
        goto fail;
    }

    background_snapshot_note(SNAPSHOT_FREEZE_STOP);

    if (!background_snapshot_wait_for_user(s, errp)) {
        goto fail;
    }

    /* The user has paused the VM for the snapshot: both copies will run */
    snapshot.resume = live ||
                      (old_state == RUN_STATE_PAUSED && snapshot.was_paused);
    if (snapshot.resume && !live) {
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
    background_snapshot_note(SNAPSHOT_FREEZE_DEVICES);

    if (!background_snapshot_arm(errp)) {
        goto fail;
    }
    background_snapshot_note(SNAPSHOT_FREEZE_ARM);

    /* In the main loop: devices expect it there, and may write guest RAM */
    migration_bh_schedule(background_snapshot_resume_bh, s);
    return true;

fail:
    if (live) {
        vm_resume(old_state);
    }
    return false;
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
 * since the destination may take its time, and that without the BQL; but with
 * mapped-ram they lay out the file.
 */
static bool background_snapshot_save_setup(MigrationState *s, QEMUFile *fb,
                                           Error **errp)
{
    QEMUFile *f = migrate_mapped_ram() ? s->to_dst_file : fb;
    bool ok;

    bql_lock();
    qemu_savevm_state_header(f);
    ok = qemu_savevm_state_setup(f, errp) == 0 &&
         snapshot_blocks_add(snapshot.ram, errp);
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

    failure = snapshot_ram_failure(snapshot.ram);
    if (failure) {
        error_setg(errp, "Background snapshot failed: %s", failure);
        return false;
    }
    return background_snapshot_check_file(f, errp);
}

/* All until the destination is closed */
static bool background_snapshot_take(MigrationState *s, QEMUFile *fb,
                                     Error **errp)
{
    int64_t start = qemu_clock_get_ms(QEMU_CLOCK_HOST);
    bool ok;

    snapshot_mender_pause();
    if (s->rdma_migration) {
        error_setg(errp, "Background-snapshot is not possible over RDMA");
        ok = false;
    } else {
        ok = background_snapshot_prepare(errp) &&
             background_snapshot_save_setup(s, fb, errp);
    }

    qemu_savevm_wait_unplug(s, MIGRATION_STATUS_SETUP,
                            MIGRATION_STATUS_ACTIVE);
    s->setup_time = qemu_clock_get_ms(QEMU_CLOCK_HOST) - start;
    if (!ok) {
        return false;
    }

    /* Until writes are trapped: then what is discarded is saved first */
    if (ram_block_uncoordinated_discard_disable(true) < 0) {
        error_setg(errp, "Something in this VM must be able to discard guest "
                   "RAM at any time");
        return false;
    }
    ok = snapshot_ram_set_trap(snapshot.ram, snapshot.trap, errp) &&
         background_snapshot_arm_ahead(errp);
    if (ok) {
        BQL_LOCK_GUARD();
        /* With the BQL nobody cancels: what is frozen will be resumed */
        ok = not_cancelled() && background_snapshot_freeze(s, fb, errp);
    }
    ram_block_uncoordinated_discard_disable(false);
    if (ok) {
        snapshot_mender_start(snapshot.ram);
        ok = background_snapshot_save(s, errp);
    }
    background_snapshot_disarm();
    return ok;
}

static void *background_snapshot_thread(void *opaque)
{
    MigrationState *s = opaque;
    QEMUFile *fb;
    Error *err = NULL;
    bool ok;

    rcu_register_thread();

    migration_rate_set(RATE_LIMIT_DISABLED);
    update_iteration_initial_status(s);

    /* Devices are saved first, but stand at the end of the stream */
    s->bioc = qio_channel_buffer_new(512 * KiB);
    qio_channel_set_name(QIO_CHANNEL(s->bioc), "vmstate-buffer");
    fb = qemu_file_new_output(QIO_CHANNEL(s->bioc));
    object_unref(OBJECT(s->bioc));

    ok = background_snapshot_take(s, fb, &err);
    snapshot_mender_finish(snapshot.ram);
    snapshot.ram = NULL;

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
    snapshot.stage = SNAPSHOT_ENDED;
    migration_bh_schedule(migration_cleanup_bh, s);
    bql_unlock();

    qemu_fclose(fb);
    object_unref(OBJECT(s));
    rcu_unregister_thread();
    return NULL;
}

bool background_snapshot_setup(Error **errp)
{
    qapi_free_SnapshotWriteTrapInfoList(snapshot.passed_over);
    snapshot.passed_over = NULL;
    snapshot.trap = snapshot_choice_make(&snapshot.passed_over, errp);
    return snapshot.trap;
}

void background_snapshot_start(MigrationState *s)
{
    snapshot.stage = SNAPSHOT_STARTED;
    snapshot.figures.trap = snapshot.trap;
    snapshot.figures.passed_over = g_steal_pointer(&snapshot.passed_over);
    snapshot.was_paused = runstate_check(RUN_STATE_PAUSED);
    snapshot_choice_begin(snapshot.trap);
    qemu_thread_create(&s->thread, MIGRATION_THREAD_SNAPSHOT,
                       background_snapshot_thread, s, QEMU_THREAD_JOINABLE);
}

void background_snapshot_finish(MigrationState *s, int ret)
{
    if (snapshot.stage != SNAPSHOT_ENDED) {
        return;
    }
    snapshot.stage = SNAPSHOT_NONE;
    snapshot_choice_end(snapshot.trap);

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
        migration_completion_end_locked(s);
    }
}

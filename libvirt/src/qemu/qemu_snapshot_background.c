/*
 * qemu_snapshot_background.c: external snapshots of running domains
 *
 * Copyright (C) 2026 the background-snapshot authors
 *
 * This library is free software; you can redistribute it and/or
 * modify it under the terms of the GNU Lesser General Public
 * License as published by the Free Software Foundation; either
 * version 2.1 of the License, or (at your option) any later version.
 *
 * This library is distributed in the hope that it will be useful,
 * but WITHOUT ANY WARRANTY; without even the implied warranty of
 * MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the GNU
 * Lesser General Public License for more details.
 *
 * You should have received a copy of the GNU Lesser General Public
 * License along with this library.  If not, see
 * <http://www.gnu.org/licenses/>.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */

#include <config.h>

#include "qemu_snapshot_background.h"

#include "qemu_block.h"
#include "qemu_domain.h"
#include "qemu_migration.h"
#include "qemu_migration_params.h"
#include "qemu_monitor.h"
#include "qemu_process.h"
#include "qemu_saveimage.h"
#include "qemu_snapshot.h"
#include "qemu_snapshot_left.h"
#include "qemu_snapshot_undo.h"

#include "snapshot_conf.h"
#include "virdomainsnapshotobjlist.h"
#include "virerror.h"
#include "virlog.h"

#define VIR_FROM_THIS VIR_FROM_QEMU

VIR_LOG_INIT("qemu.qemu_snapshot_background");


/* With these, QEMU does not tell whether a disk has its overlay, so that an
 * undo by another daemon would not know. */
static bool
qemuSnapshotBackgroundHasFilter(virDomainDef *def)
{
    size_t i;

    for (i = 0; i < def->ndisks; i++) {
        if (def->disks[i]->copy_on_read == VIR_TRISTATE_SWITCH_ON ||
            def->disks[i]->nthrottlefilters > 0)
            return true;
    }

    return false;
}


/* Not if the user wants the state at the end, or the domain does not go on. */
static bool
qemuSnapshotBackgroundIsWanted(virDomainObj *vm,
                               virQEMUDriverConfig *cfg,
                               unsigned int flags)
{
    return cfg->snapshotMemoryBackground != QEMU_SNAPSHOT_MEMORY_BACKGROUND_FORBID &&
           virDomainObjGetState(vm, NULL) == VIR_DOMAIN_RUNNING &&
           !(flags & (VIR_DOMAIN_SNAPSHOT_CREATE_LIVE |
                      VIR_DOMAIN_SNAPSHOT_CREATE_HALT));
}


/**
 * qemuSnapshotBackgroundBegin:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 * @snapdef: definition of a snapshot, as the user has given it
 * @cfg: driver configuration
 * @flags: bitwise-OR of virDomainSnapshotCreateFlags
 *
 * Undo first what is left of another snapshot: that changes the disks, so that
 * nothing may have been noted of them. If that fails, one that needs no undo
 * itself is taken nevertheless, and keeps the overlays: it may make them part
 * of something that is good.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotBackgroundBegin(virQEMUDriver *driver,
                            virDomainObj *vm,
                            virDomainSnapshotDef *snapdef,
                            virQEMUDriverConfig *cfg,
                            unsigned int flags)
{
    bool wanted = snapdef->memory == VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL &&
        qemuSnapshotBackgroundIsWanted(vm, cfg, flags);

    if (!virDomainObjIsActive(vm) || qemuSnapshotLeftRetry(driver, vm) == 0)
        return 0;

    if (wanted || virDomainObjCheckActive(vm) < 0)
        return -1;

    VIR_WARN("Domain '%s' keeps overlays of a snapshot that was not completed",
             vm->def->name);
    qemuSnapshotUndoForget(driver, vm);
    virResetLastError();
    return 0;
}


/**
 * qemuSnapshotBackgroundIsPossible:
 * @vm: domain
 * @cfg: driver configuration
 * @has_manual: whether the user takes snapshots of some disks after this
 * @flags: bitwise-OR of virDomainSnapshotCreateFlags
 *
 * Whether the memory of an external snapshot is saved while the domain runs
 * again. Not if the user wants the state at the end (LIVE), or the domain is
 * not to run afterwards.
 *
 * Returns 1 if it is, 0 if not, -1 on error.
 */
int
qemuSnapshotBackgroundIsPossible(virDomainObj *vm,
                                 virQEMUDriverConfig *cfg,
                                 bool has_manual,
                                 unsigned int flags)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    bool has_command = virQEMUCapsGet(priv->qemuCaps,
                                      QEMU_CAPS_QUERY_SNAPSHOT_WRITE_TRAPS);
    g_autofree char *reason = NULL;
    int rc = 0;

    if (has_manual || !qemuSnapshotBackgroundIsWanted(vm, cfg, flags))
        return 0;

    if (qemuSnapshotBackgroundHasFilter(vm->def)) {
        reason = g_strdup(_("a disk has copy_on_read or throttle filters"));
    } else if (has_command) {
        if (qemuDomainObjEnterMonitorAsync(vm, VIR_ASYNC_JOB_SNAPSHOT) < 0)
            return -1;
        rc = qemuMonitorGetSnapshotWriteTrap(priv->mon, &reason);
        qemuDomainObjExitMonitor(vm);
    } else {
        reason = g_strdup(_("this QEMU binary does not support them"));
    }

    if (rc != 0)
        return rc;

    if (cfg->snapshotMemoryBackground == QEMU_SNAPSHOT_MEMORY_BACKGROUND_REQUIRE) {
        virReportError(VIR_ERR_OPERATION_UNSUPPORTED,
                       _("background snapshots of domain '%1$s' are not possible: %2$s"),
                       vm->def->name, NULLSTR(reason));
        return -1;
    }

    /* That others do not have them is no news. */
    if (has_command)
        VIR_WARN("Background snapshots of domain '%s' are not possible: %s",
                 vm->def->name, NULLSTR(reason));
    else
        VIR_INFO("Background snapshots of domain '%s' are not possible: %s",
                 vm->def->name, NULLSTR(reason));
    return 0;
}


typedef struct _qemuSnapshotBackgroundData qemuSnapshotBackgroundData;
struct _qemuSnapshotBackgroundData {
    qemuSnapshotDiskContext *disks;
    /* the disks have their overlays, and QEMU was told to go on */
    bool done;
    /* QEMU was told to resume the domain by itself, and has done it */
    bool resumed;
};


static bool
qemuSnapshotBackgroundIsPaused(virDomainObj *vm)
{
    int reason;

    return virDomainObjGetState(vm, &reason) == VIR_DOMAIN_PAUSED &&
           reason == VIR_DOMAIN_PAUSED_SNAPSHOT;
}


/* Whether QEMU still saves memory, or waits for us to do so. */
static bool
qemuSnapshotBackgroundIsSaving(virDomainObj *vm)
{
    qemuDomainJobDataPrivate *privJob;

    if (!vm->job->current)
        return false;
    privJob = vm->job->current->privateData;

    switch ((qemuMonitorMigrationStatus) privJob->stats.mig.status) {
    case QEMU_MONITOR_MIGRATION_STATUS_PRE_SWITCHOVER:
    case QEMU_MONITOR_MIGRATION_STATUS_DEVICE:
    case QEMU_MONITOR_MIGRATION_STATUS_ACTIVE:
        return true;

    case QEMU_MONITOR_MIGRATION_STATUS_INACTIVE:
    case QEMU_MONITOR_MIGRATION_STATUS_SETUP:
    case QEMU_MONITOR_MIGRATION_STATUS_POSTCOPY:
    case QEMU_MONITOR_MIGRATION_STATUS_POSTCOPY_PAUSED:
    case QEMU_MONITOR_MIGRATION_STATUS_POSTCOPY_RECOVER_SETUP:
    case QEMU_MONITOR_MIGRATION_STATUS_POSTCOPY_RECOVER:
    case QEMU_MONITOR_MIGRATION_STATUS_COMPLETED:
    case QEMU_MONITOR_MIGRATION_STATUS_ERROR:
    case QEMU_MONITOR_MIGRATION_STATUS_CANCELLING:
    case QEMU_MONITOR_MIGRATION_STATUS_CANCELLED:
    case QEMU_MONITOR_MIGRATION_STATUS_WAIT_UNPLUG:
    case QEMU_MONITOR_MIGRATION_STATUS_LAST:
        break;
    }

    return false;
}


/* Autodestroy takes the job away from us before it ends the domain. */
static int
qemuSnapshotBackgroundCheckJob(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    if (virDomainObjCheckActive(vm) < 0)
        return -1;

    if (priv->beingDestroyed || !vm->job->current) {
        virReportError(VIR_ERR_OPERATION_FAILED, "%s",
                       _("domain is being destroyed"));
        return -1;
    }

    return 0;
}


/* QEMU does not stop one that has shut down. */
static bool
qemuSnapshotBackgroundIsToBePaused(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    return virDomainObjGetState(vm, NULL) == VIR_DOMAIN_RUNNING &&
           !priv->pausedShutdown;
}


/* Wait, as long as QEMU saves, until the domain is not in @state any more. */
static int
qemuSnapshotBackgroundWaitState(virDomainObj *vm,
                                bool (*state)(virDomainObj *vm))
{
    while (state(vm) && qemuSnapshotBackgroundIsSaving(vm)) {
        if (qemuDomainObjWait(vm) < 0)
            return -1;
    }

    return 0;
}


/**
 * qemuSnapshotBackgroundPaused:
 * @vm: domain that QEMU has stopped
 * @opaque: qemuSnapshotBackgroundData
 *
 * The snapshot's moment: give the disks their overlays, and have QEMU save
 * the state of devices and resume the domain.
 *
 * Returns 0 when it runs, or the migration has ended; -1 on error.
 */
static int
qemuSnapshotBackgroundPaused(virDomainObj *vm,
                             void *opaque)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    qemuSnapshotBackgroundData *data = opaque;
    bool done = false;
    int rc = -1;
    int ret = -1;

    /* An abort in between would have QEMU resume the domain. */
    qemuDomainObjSetAsyncJobMask(vm, JOB_MASK(VIR_JOB_QUERY));

    /* What was being done before, maybe an abort, or the end of the domain,
     * comes to its end. */
    if (virDomainObjBeginNestedJob(vm, VIR_ASYNC_JOB_SNAPSHOT) < 0)
        goto cleanup;
    virDomainObjEndJob(vm);

    if (qemuSnapshotBackgroundCheckJob(vm) < 0)
        goto cleanup;

    /* The STOP event gives up the locks. */
    priv->signalStop = true;
    rc = qemuSnapshotBackgroundWaitState(vm, qemuSnapshotBackgroundIsToBePaused);
    priv->signalStop = false;
    if (rc < 0)
        goto cleanup;

    if (!qemuSnapshotBackgroundIsSaving(vm)) {
        ret = 0;
        goto cleanup;
    }

    if (!qemuSnapshotBackgroundIsPaused(vm) || priv->snapshotBackgroundPanic) {
        virReportError(VIR_ERR_OPERATION_FAILED, "%s",
                       _("domain was not stopped for the snapshot"));
        goto cleanup;
    }

    done = qemuSnapshotDiskCreate(data->disks) == 0;
    if (qemuSnapshotBackgroundCheckJob(vm) < 0)
        goto cleanup;

    /* Whether QEMU goes on or is cancelled, it resumes the domain. */
    if (qemuProcessStartCPUsPrepare(priv->driver, vm, VIR_DOMAIN_RUNNING_UNPAUSED) < 0 ||
        !done)
        goto cleanup;

    /* The domain does not stand still until the end of the job. */
    vm->job->current->stopped = 0;

    if (qemuMigrationSrcContinue(vm, QEMU_MONITOR_MIGRATION_STATUS_PRE_SWITCHOVER,
                                 VIR_ASYNC_JOB_SNAPSHOT) < 0 ||
        qemuSnapshotBackgroundCheckJob(vm) < 0)
        goto cleanup;
    data->done = true;

    /* Who waits for its RESUME may miss it, if something stops it at once. */
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK);
    if (qemuSnapshotBackgroundWaitState(vm, qemuSnapshotBackgroundIsPaused) < 0)
        goto cleanup;

    data->resumed = !qemuSnapshotBackgroundIsPaused(vm);
    ret = 0;

 cleanup:
    /* Allow the job to be cancelled; and the domain to be paused, unless that
     * is still to be resumed. */
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK |
                                 (data->resumed ?
                                  (JOB_MASK(VIR_JOB_SUSPEND) |
                                   JOB_MASK(VIR_JOB_MODIFY_MIGRATION_SAFE) |
                                   JOB_MASK(VIR_JOB_MIGRATION_OP)) : 0));
    return ret;
}


/**
 * qemuSnapshotBackgroundAbandon:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 *
 * Undo a snapshot that has failed. The error that is set is kept, and tells
 * also of a failure to undo it. Does nothing if there is none.
 */
void
qemuSnapshotBackgroundAbandon(virQEMUDriver *driver,
                              virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    virErrorPtr orig_err = NULL;
    int reason;
    int rc;

    if (!snapdef)
        return;

    /* It is noted when QEMU waits for the disks. */
    g_clear_pointer(&vm->job->completed, virDomainJobDataFree);

    virErrorPreserveLast(&orig_err);
    qemuDomainObjSetAsyncJobMask(vm, QEMU_SNAPSHOT_UNDO_JOB_MASK);

    if ((rc = qemuSnapshotUndo(driver, vm)) < 0) {
        g_autofree char *why = g_strdup(virGetLastErrorMessage());

        virReportError(VIR_ERR_OPERATION_FAILED,
                       _("%1$s; and the overlays of its disks could not be merged back: %2$s"),
                       orig_err ? orig_err->message : "", why);
        g_clear_pointer(&orig_err, virFreeError);
        virErrorPreserveLast(&orig_err);
    }

    /* It ran when the snapshot began. The image, which has gone, may have left
     * its disks no room. */
    if (virDomainObjIsActive(vm) &&
        virDomainObjGetState(vm, &reason) == VIR_DOMAIN_PAUSED &&
        reason == VIR_DOMAIN_PAUSED_IOERROR &&
        qemuProcessStartCPUs(driver, vm, VIR_DOMAIN_RUNNING_UNPAUSED,
                             VIR_ASYNC_JOB_SNAPSHOT) < 0)
        VIR_WARN("Cannot resume domain '%s'", vm->def->name);

    qemuSnapshotUndoEnd(driver, vm, snapdef, rc);

    virErrorRestore(&orig_err);
}


/**
 * qemuSnapshotBackgroundCreate:
 * @driver: qemu driver
 * @vm: running domain
 * @snap: snapshot with external memory
 * @cfg: driver configuration
 * @flags: bitwise-OR of virDomainSnapshotCreateFlags
 *
 * Take an external snapshot of one moment: QEMU stops the domain by itself,
 * waits for the transaction of its disks, saves the state of the devices,
 * and resumes the domain by itself. It saves the memory while the domain runs.
 *
 * What can be checked is checked before that moment: the image is open and has
 * its header, the overlays are created, QEMU has looked at the memory.
 *
 * Returns 0 on success, -1 on error. Then call qemuSnapshotBackgroundAbandon();
 * or qemuSnapshotUndoForget(), once the snapshot's metadata is written.
 */
int
qemuSnapshotBackgroundCreate(virQEMUDriver *driver,
                             virDomainObj *vm,
                             virDomainMomentObj *snap,
                             virQEMUDriverConfig *cfg,
                             unsigned int flags)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    virDomainSnapshotDef *snapdef = virDomainSnapshotObjGetDef(snap);
    bool reuse = (flags & VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT) != 0;
    g_autoptr(GHashTable) blockNamedNodeData = NULL;
    g_autoptr(virQEMUSaveData) data = NULL;
    g_autoptr(virCommand) compressor = NULL;
    g_autoptr(qemuMigrationParams) params = NULL;
    /* QEMU refuses more than there is memory */
    unsigned int bufferMiB = MIN(cfg->snapshotMemoryBufferSize,
                                 virDomainDefGetMemoryTotal(vm->def) / 1024);
    g_autoptr(qemuSaveImageFile) image = NULL;
    g_autoptr(qemuSnapshotDiskContext) disks = NULL;
    qemuSnapshotBackgroundData paused = { NULL, false, false };
    virErrorPtr orig_err = NULL;
    int ret = -1;

    if (!(blockNamedNodeData = qemuBlockGetNamedNodeData(vm, VIR_ASYNC_JOB_SNAPSHOT)))
        return -1;

    if (qemuSnapshotMemoryPrepare(vm, snapdef, cfg, true, &data, &compressor,
                                  &params) < 0)
        return -1;

    if (qemuMigrationParamsSetBackgroundSnapshot(params, bufferMiB,
                                                 cfg->snapshotMemoryStallLimit) < 0)
        return -1;

    if (qemuSnapshotUndoRemember(driver, vm, snapdef, reuse) < 0)
        return -1;

    if (!(image = qemuSaveImageFileNew(driver, vm, snapdef->memorysnapshotfile,
                                       data, 0)) ||
        !(disks = qemuSnapshotDiskPrepareActiveExternal(vm, snap, reuse,
                                                        blockNamedNodeData,
                                                        VIR_ASYNC_JOB_SNAPSHOT))) {
        g_clear_pointer(&image, qemuSaveImageFileFree);
        qemuSnapshotUndoForget(driver, vm);
        return -1;
    }

    paused.disks = disks;
    priv->pausedReason = VIR_DOMAIN_PAUSED_SNAPSHOT;
    qemuDomainSaveStatus(vm);
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK);

    ret = qemuSaveImageFileWrite(driver, vm, image, data, compressor, params,
                                 qemuSnapshotBackgroundPaused, &paused, 0,
                                 VIR_ASYNC_JOB_SNAPSHOT);

    /* Forbid any further manipulation; it is too late for an abort. */
    qemuDomainObjSetAsyncJobMask(vm, JOB_MASK(VIR_JOB_QUERY) |
                                 JOB_MASK(VIR_JOB_DESTROY));
    if (priv->pausedReason == VIR_DOMAIN_PAUSED_SNAPSHOT)
        priv->pausedReason = VIR_DOMAIN_PAUSED_UNKNOWN;

    if (ret == 0 && vm->job->abortJob) {
        virReportError(VIR_ERR_OPERATION_ABORTED, "%s",
                       _("snapshot canceled by client"));
        ret = -1;
    }

    if (ret == 0 && !paused.done) {
        virReportError(VIR_ERR_OPERATION_FAILED, "%s",
                       _("QEMU did not wait for the snapshot of the disks"));
        ret = -1;
    }

    if (ret == 0)
        return 0;

    /* First of all the guest goes on. */
    virErrorPreserveLast(&orig_err);
    if (!paused.resumed && qemuSnapshotUndoResume(driver, vm) < 0)
        VIR_WARN("Cannot resume domain '%s'", vm->def->name);
    virErrorRestore(&orig_err);
    return -1;
}

/*
 * qemu_snapshot_left.c: undo external snapshots that nobody undoes any more
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

#include <sys/stat.h>
#include <unistd.h>

#include "qemu_snapshot_left.h"

#include "qemu_block.h"
#include "qemu_domain.h"
#include "qemu_migration.h"
#include "qemu_migration_params.h"
#include "qemu_monitor.h"
#include "qemu_process.h"
#include "qemu_snapshot.h"
#include "qemu_snapshot_undo.h"

#include "snapshot_conf.h"
#include "virdomainsnapshotobjlist.h"
#include "virerror.h"
#include "virlog.h"

#define VIR_FROM_THIS VIR_FROM_QEMU

VIR_LOG_INIT("qemu.qemu_snapshot_left");


/* How long to wait for QEMU to end its jobs, in steps of 10 ms */
#define QEMU_SNAPSHOT_LEFT_PATIENCE 3000


/* Have QEMU forget the overlays that it has, but uses for no disk.
 * Returns 1 if it has no other, 0 if it does use one, -1 on error. */
static int
qemuSnapshotLeftDeleteNodes(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(GHashTable) nodes = NULL;
    /* who refers to whom */
    const char *suffixes[] = { "-format", "-storage" };
    size_t i;
    int ret = 1;

    if (!(nodes = qemuBlockGetNamedNodeData(vm, VIR_ASYNC_JOB_SNAPSHOT)))
        return -1;

    for (i = 0; i < G_N_ELEMENTS(suffixes); i++) {
        GHashTableIter iter;
        void *name;

        g_hash_table_iter_init(&iter, nodes);
        while (g_hash_table_iter_next(&iter, &name, NULL)) {
            unsigned long long id;
            int rc;

            if (!qemuSnapshotParseNodename(name, suffixes[i], &id) ||
                id <= priv->snapshotBackgroundNodes)
                continue;

            if (qemuDomainObjEnterMonitorAsync(vm, VIR_ASYNC_JOB_SNAPSHOT) < 0)
                return -1;
            rc = qemuMonitorBlockdevDel(priv->mon, name);
            qemuDomainObjExitMonitor(vm);

            if (rc < 0)
                ret = 0;
            /* if it was not saved before the daemon ended */
            priv->nodenameindex = MAX(priv->nodenameindex, id);
        }
    }

    return ret;
}


/* Overlays that were created, but that the domain does not use. */
static int
qemuSnapshotLeftDiscardUnused(virQEMUDriver *driver,
                              virDomainObj *vm,
                              virDomainSnapshotDef *snapdef)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    bool used = qemuSnapshotLeftDeleteNodes(vm) != 1;
    size_t i;
    int ret = 0;

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;
        qemuSnapshotUndoOverlay overlay = qemuSnapshotUndoLookAt(vm->def, snapdef,
                                                                 snapdisk);
        struct stat sb;

        if (snapdisk->snapshot != VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL ||
            overlay == QEMU_SNAPSHOT_UNDO_OVERLAY_TOP)
            continue;

        if (used || overlay == QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP) {
            VIR_WARN("Overlay '%s' of domain '%s' may be in use",
                     NULLSTR(snapdisk->src->path), vm->def->name);
            continue;
        }

        if (priv->snapshotBackgroundReuse)
            continue;

        qemuDomainStorageSourceAccessRevoke(driver, vm, snapdisk->src);

        if (virStorageSourceIsLocalStorage(snapdisk->src) &&
            stat(snapdisk->src->path, &sb) == 0 && S_ISREG(sb.st_mode) &&
            unlink(snapdisk->src->path) < 0) {
            virReportSystemError(errno, _("cannot remove overlay '%1$s'"),
                                 snapdisk->src->path);
            ret = -1;
        }
    }

    return ret;
}


/* Whether nothing was missing when the daemon ended but to forget it. */
static bool
qemuSnapshotLeftIsComplete(virDomainObj *vm,
                           virDomainSnapshotDef *snapdef)
{
    virDomainMomentObj *snap = virDomainSnapshotFindByName(vm->snapshots,
                                                           snapdef->parent.name);

    return snap && snap->def->creationTime == snapdef->parent.creationTime;
}


/* What another daemon has left, or an undo that failed. */
static int
qemuSnapshotLeftUndo(virQEMUDriver *driver,
                     virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    int rc = 0;

    if (virDomainObjIsActive(vm)) {
        rc = qemuSnapshotDetectOverlays(vm, snapdef, VIR_ASYNC_JOB_SNAPSHOT);

        if (rc < 0)
            qemuSnapshotUndoWaitStopped(vm);

        /* Autodestroy takes the job away, and another one drops the notes. */
        if (priv->snapshotBackground != snapdef) {
            virReportError(VIR_ERR_OPERATION_INVALID,
                           _("domain '%1$s' was started"), vm->def->name);
            return -1;
        }

        /* Not before it is noted which files are its disks. After an undo that
         * failed it is none of ours. */
        if (!priv->snapshotBackgroundFailed &&
            qemuSnapshotUndoResume(driver, vm) < 0)
            VIR_WARN("Cannot resume domain '%s'", vm->def->name);
    }

    if (qemuSnapshotLeftIsComplete(vm, snapdef))
        return 0;

    if ((rc < 0 && virDomainObjIsActive(vm)) ||
        qemuSnapshotUndo(driver, vm) < 0)
        return -1;

    /* What is not used after an undo that failed may have been made so by the
     * user, and hold what the guest has written. */
    if (virDomainObjIsActive(vm) && !priv->snapshotBackgroundRetried)
        return qemuSnapshotLeftDiscardUnused(driver, vm, snapdef);

    return 0;
}


/**
 * qemuSnapshotLeftRetry:
 * @driver: qemu driver
 * @vm: active domain, in a snapshot job
 *
 * Undo what an undo that failed has left. Does nothing if there is nothing.
 *
 * Returns 0 if nothing is left, -1 on error.
 */
int
qemuSnapshotLeftRetry(virQEMUDriver *driver,
                      virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    int rc;

    if (!snapdef)
        return 0;

    priv->snapshotBackgroundAhead = true;
    qemuDomainObjSetAsyncJobMask(vm, QEMU_SNAPSHOT_UNDO_JOB_MASK);

    if ((rc = qemuSnapshotLeftUndo(driver, vm)) < 0) {
        g_autofree char *why = g_strdup(virGetLastErrorMessage());

        virReportError(VIR_ERR_OPERATION_FAILED,
                       _("the overlays of snapshot '%1$s', which has failed, could not be merged back: %2$s"),
                       snapdef->parent.name, why);
    }

    qemuSnapshotUndoEnd(driver, vm, snapdef, rc);
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_NONE);

    if (rc < 0)
        return -1;

    return virDomainObjCheckActive(vm);
}


/* Until QEMU has ended the jobs of an undo in which the daemon ended: they are
 * cancelled by now. */
static void
qemuSnapshotLeftWaitBlockJobs(virDomainObj *vm)
{
    g_autoptr(virDomainSnapshotDef) snapdef =
        virObjectRef(QEMU_DOMAIN_PRIVATE(vm)->snapshotBackground);
    size_t patience = QEMU_SNAPSHOT_LEFT_PATIENCE;
    size_t i;

    for (i = 0; i < snapdef->ndisks; i++) {
        while (virDomainObjIsActive(vm) && patience > 0) {
            virDomainDiskDef *disk = virDomainDiskByTarget(vm->def,
                                                           snapdef->disks[i].name);
            g_autoptr(qemuBlockJobData) job = disk ? qemuBlockJobDiskGetJob(disk) : NULL;

            if (!job)
                break;

            virObjectUnlock(vm);
            g_usleep(10 * 1000);
            virObjectLock(vm);
            patience--;
        }
    }
}


/* Until QEMU has ended the migration of the snapshot, which is cancelled by now:
 * before, it does not take other capabilities. */
static void
qemuSnapshotLeftWaitMigration(virDomainObj *vm)
{
    g_autoptr(virDomainJobData) jobData =
        virDomainJobDataInit(&virQEMUDriverDomainJobConfig.jobDataPrivateCb);
    qemuDomainJobDataPrivate *privJob = jobData->privateData;
    size_t patience = QEMU_SNAPSHOT_LEFT_PATIENCE;

    while (virDomainObjIsActive(vm) && patience > 0 &&
           qemuMigrationAnyFetchStats(vm, VIR_ASYNC_JOB_SNAPSHOT, jobData, NULL) == 0 &&
           privJob->stats.mig.status == QEMU_MONITOR_MIGRATION_STATUS_CANCELLING) {
        virObjectUnlock(vm);
        g_usleep(10 * 1000);
        virObjectLock(vm);
        patience--;
    }
}


/**
 * qemuSnapshotLeftRecoverJob:
 * @vm: domain that has the notes of a snapshot
 * @job: what it did when the daemon ended
 *
 * To be called before that job is recovered, and the domain is resumed.
 */
void
qemuSnapshotLeftRecoverJob(virDomainObj *vm,
                           virDomainJobObj *job)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    qemuDomainJobPrivate *jobPriv = job->privateData;
    int reason;

    /* What jobs there are, or paused it, is not ours. */
    if (priv->snapshotBackgroundFailed)
        return;

    /* A daemon that ended early, too, may have noted that there is none. */
    if (job->asyncJob == VIR_ASYNC_JOB_NONE)
        job->asyncJob = VIR_ASYNC_JOB_SNAPSHOT;
    if (job->asyncJob != VIR_ASYNC_JOB_SNAPSHOT)
        return;

    if (jobPriv)
        jobPriv->snapshotDelete = true;

    if (virDomainObjGetState(vm, &reason) == VIR_DOMAIN_PAUSED &&
        (reason == VIR_DOMAIN_PAUSED_SNAPSHOT ||
         reason == VIR_DOMAIN_PAUSED_MIGRATION ||
         reason == VIR_DOMAIN_PAUSED_UNKNOWN))
        priv->snapshotBackgroundResume = true;

    if (qemuSnapshotDetectOverlays(vm, priv->snapshotBackground,
                                   VIR_ASYNC_JOB_NONE) < 0)
        VIR_WARN("Cannot tell what the disks of domain '%s' are",
                 vm->def->name);
}


/**
 * qemuSnapshotLeftRecover:
 * @driver: qemu driver
 * @vm: domain, without a job
 * @job: what it did when the daemon ended
 *
 * Undo a snapshot that was being taken then, or one whose undo had failed. Wait
 * for other jobs, as long as they last.
 */
void
qemuSnapshotLeftRecover(virQEMUDriver *driver,
                        virDomainObj *vm,
                        virDomainJobObj *job)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    qemuDomainJobPrivate *jobPriv = job->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    int rc = 0;

    if (!snapdef)
        return;

    /* It may run elsewhere, on the same disks. */
    if (job->asyncJob == VIR_ASYNC_JOB_MIGRATION_OUT) {
        qemuSnapshotUndoEnd(driver, vm, snapdef, -1);
        return;
    }

    /* Their events need a job of their own. */
    if (!priv->snapshotBackgroundFailed)
        qemuSnapshotLeftWaitBlockJobs(vm);

    /* Others' jobs may take longer than one waits for them. */
    while (virDomainObjBeginAsyncJob(vm, VIR_ASYNC_JOB_SNAPSHOT,
                                     VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, 0) < 0) {
        if (priv->snapshotBackground != snapdef || vm->removing)
            return;

        virResetLastError();
        virObjectUnlock(vm);
        g_usleep(100 * 1000);
        virObjectLock(vm);
    }

    qemuDomainObjSetAsyncJobMask(vm, QEMU_SNAPSHOT_UNDO_JOB_MASK);

    if (priv->snapshotBackground == snapdef) {
        priv->snapshotBackgroundAhead = true;

        if ((rc = qemuSnapshotLeftUndo(driver, vm)) < 0)
            VIR_WARN("Domain '%s' keeps overlays of a snapshot that was not completed",
                     vm->def->name);
    }

    if (jobPriv && jobPriv->migParams) {
        qemuSnapshotLeftWaitMigration(vm);
        qemuMigrationParamsReset(vm, VIR_ASYNC_JOB_SNAPSHOT, jobPriv->migParams, 0);
    }

    qemuSnapshotUndoEnd(driver, vm, snapdef, rc);

    virDomainObjEndAsyncJob(vm);
    qemuProcessSubmitGuestPanic(vm);
}

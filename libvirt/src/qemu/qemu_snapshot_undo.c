/*
 * qemu_snapshot_undo.c: undo external snapshots that were not completed
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

#include "qemu_snapshot_undo.h"

#include "qemu_block.h"
#include "qemu_domain.h"
#include "qemu_migration_params.h"
#include "qemu_monitor.h"
#include "qemu_process.h"
#include "qemu_snapshot.h"
#include "qemu_snapshot_files.h"

#include "snapshot_conf.h"
#include "virdomainsnapshotobjlist.h"
#include "virerror.h"
#include "virfile.h"
#include "virlog.h"
#include "virprocess.h"
#include "virstring.h"

#define VIR_FROM_THIS VIR_FROM_QEMU

VIR_LOG_INIT("qemu.qemu_snapshot_undo");


/* How long to wait for QEMU's end, or for its jobs', in steps of 10 ms */
#define QEMU_SNAPSHOT_UNDO_PATIENCE 3000


/* What the domain, as it runs or has just run, uses the file for. */
static qemuSnapshotUndoOverlay
qemuSnapshotUndoLookAt(virDomainDef *def,
                       virDomainSnapshotDef *snapdef,
                       virDomainSnapshotDiskDef *snapdisk)
{
    virDomainDiskDef *disk = virDomainDiskByTarget(def, snapdisk->name);
    size_t i;

    if (!disk)
        return QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP;

    if (qemuSnapshotDiskIsOverlay(disk, snapdef, snapdisk))
        return QEMU_SNAPSHOT_UNDO_OVERLAY_TOP;

    for (i = 0; i < def->ndisks; i++) {
        virStorageSource *src;

        for (src = def->disks[i]->src; src; src = src->backingStore) {
            if (virStorageSourceIsSameLocation(src, snapdisk->src))
                return QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP;
        }
    }

    return QEMU_SNAPSHOT_UNDO_OVERLAY_UNUSED;
}


/**
 * qemuSnapshotUndoIsAhead:
 * @vm: domain
 *
 * Returns true if a snapshot, or the start of the daemon, ends with an undo, or
 * may do so: then the status of the domain is needed until it is done.
 */
bool
qemuSnapshotUndoIsAhead(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    return priv->snapshotBackground && priv->snapshotBackgroundAhead;
}


/**
 * qemuSnapshotUndoDrop:
 * @vm: domain
 *
 * There is nothing to undo any more, or nobody to do it. The status of the
 * domain is the caller's.
 */
void
qemuSnapshotUndoDrop(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    g_clear_pointer(&priv->snapshotBackground, virObjectUnref);
    g_clear_pointer(&priv->snapshotBackgroundOverlays, g_free);

    priv->snapshotBackgroundResume = false;
    priv->snapshotBackgroundFailed = false;
    priv->snapshotBackgroundAhead = false;
}


/**
 * qemuSnapshotUndoStopped:
 * @vm: domain that has ended, but still has its live definition
 *
 * Note what an undo has to know of that definition. If there is nobody to do
 * it, forget it: the domain keeps its overlays.
 */
void
qemuSnapshotUndoStopped(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    virDomainSnapshotDef *snapdef = priv->snapshotBackground;
    size_t i;

    if (!snapdef)
        return;

    if (!qemuSnapshotUndoIsAhead(vm)) {
        VIR_WARN("Domain '%s' keeps overlays of a snapshot that was not completed",
                 vm->def->name);
        qemuSnapshotUndoDrop(vm);
        return;
    }

    g_free(priv->snapshotBackgroundOverlays);
    priv->snapshotBackgroundOverlays = g_new0(qemuSnapshotUndoOverlay,
                                              snapdef->ndisks);

    for (i = 0; i < snapdef->ndisks; i++) {
        priv->snapshotBackgroundOverlays[i] =
            qemuSnapshotUndoLookAt(vm->def, snapdef, snapdef->disks + i);
    }
}


/* Whether the process is there; libvirt may not know of its end yet. */
static bool
qemuSnapshotUndoHasQEMU(virDomainObj *vm)
{
    return virDomainObjIsActive(vm) && virProcessKill(vm->pid, 0) == 0;
}


/* Wait until qemuProcessStop(), in another thread, has done all of its work. */
static void
qemuSnapshotUndoWaitStopped(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    size_t patience = QEMU_SNAPSHOT_UNDO_PATIENCE;

    while (virDomainObjIsActive(vm) && patience > 0 &&
           (priv->beingDestroyed || !qemuSnapshotUndoHasQEMU(vm))) {
        virObjectUnlock(vm);
        g_usleep(10 * 1000);
        virObjectLock(vm);
        patience--;
    }

    if (virDomainObjBeginNestedJob(vm, VIR_ASYNC_JOB_SNAPSHOT) == 0)
        virDomainObjEndJob(vm);
}


/**
 * qemuSnapshotUndoResume:
 * @driver: qemu driver
 * @vm: domain that a snapshot may have left paused
 *
 * Make sure that the domain runs after a snapshot has failed.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotUndoResume(virQEMUDriver *driver,
                       virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    bool resume = priv->snapshotBackgroundResume;
    virObjectEvent *event;
    int reason;

    priv->snapshotBackgroundResume = false;

    if (!virDomainObjIsActive(vm) ||
        virDomainObjGetState(vm, &reason) != VIR_DOMAIN_PAUSED ||
        (!resume && reason != VIR_DOMAIN_PAUSED_SNAPSHOT))
        return 0;

    /* QEMU may have done it, but its event be still on its way: that does no
     * harm. */
    if (qemuProcessStartCPUs(driver, vm, VIR_DOMAIN_RUNNING_UNPAUSED,
                             VIR_ASYNC_JOB_SNAPSHOT) == 0)
        return 0;

    event = virDomainEventLifecycleNewFromObj(vm, VIR_DOMAIN_EVENT_SUSPENDED,
                                              VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR);
    virObjectEventStateQueue(driver->domainEventState, event);
    virDomainObjSetState(vm, VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_API_ERROR);
    return -1;
}


/**
 * qemuSnapshotUndo:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 *
 * Give the domain the disks back that it had before the snapshot which
 * qemuSnapshotUndoRemember() was told of; if the domain has ended meanwhile,
 * its definition and its files. Remove the image.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotUndo(virQEMUDriver *driver,
                 virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    qemuDomainJobPrivate *jobPriv = vm->job->privateData;
    int ret = 0;

    /* The next daemon cancels the block jobs, and tries again. */
    jobPriv->snapshotDelete = true;
    priv->snapshotBackgroundFailed = false;

    /* First, as to merge takes room. */
    if (!priv->snapshotBackgroundKeepImage) {
        if (unlink(snapdef->memorysnapshotfile) < 0 && errno != ENOENT)
            VIR_WARN("Cannot remove incomplete image '%s'",
                     snapdef->memorysnapshotfile);
        else
            priv->snapshotBackgroundKeepImage = true; /* the next is a good one */
    }

    qemuDomainSaveStatus(vm);

    if (cfg->snapshotMemoryKeepOverlays) {
        VIR_INFO("Leaving domain '%s' with the overlays of a failed snapshot",
                 vm->def->name);
    } else {
        qemuSnapshotUndoWaitStopped(vm);

        if (virDomainObjIsActive(vm))
            ret = qemuSnapshotMergeOverlays(vm, snapdef,
                                            priv->snapshotBackgroundReuse);

        /* QEMU may have ended meanwhile: its monitor tells before the worker
         * knows. */
        if (ret < 0 && (priv->beingDestroyed || !qemuSnapshotUndoHasQEMU(vm)))
            qemuSnapshotUndoWaitStopped(vm);

        if (!virDomainObjIsActive(vm))
            ret = qemuSnapshotFilesMerge(driver, vm, snapdef);
    }

    return ret;
}


/* Have QEMU forget the overlays that it has, but uses for no disk.
 * Returns 1 if it has no other, 0 if it does use one, -1 on error. */
static int
qemuSnapshotUndoDeleteNodes(virDomainObj *vm)
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
qemuSnapshotUndoDiscardUnused(virQEMUDriver *driver,
                              virDomainObj *vm,
                              virDomainSnapshotDef *snapdef)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    bool used = qemuSnapshotUndoDeleteNodes(vm) != 1;
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
qemuSnapshotUndoIsComplete(virDomainObj *vm,
                           virDomainSnapshotDef *snapdef)
{
    virDomainMomentObj *snap = virDomainSnapshotFindByName(vm->snapshots,
                                                           snapdef->parent.name);

    return snap && snap->def->creationTime == snapdef->parent.creationTime;
}


/* What another daemon has left, or an undo that failed. */
static int
qemuSnapshotUndoLeft(virQEMUDriver *driver,
                     virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    int rc = 0;

    if (virDomainObjIsActive(vm)) {
        rc = qemuSnapshotDetectOverlays(vm, snapdef, VIR_ASYNC_JOB_SNAPSHOT);

        /* Not before it is noted which files are its disks. After an undo that
         * failed it is none of ours. */
        if (!priv->snapshotBackgroundFailed &&
            qemuSnapshotUndoResume(driver, vm) < 0)
            VIR_WARN("Cannot resume domain '%s'", vm->def->name);
    }

    if (qemuSnapshotUndoIsComplete(vm, snapdef))
        return 0;

    if (rc < 0 || qemuSnapshotUndo(driver, vm) < 0)
        return -1;

    if (virDomainObjIsActive(vm))
        return qemuSnapshotUndoDiscardUnused(driver, vm, snapdef);

    return 0;
}


/**
 * qemuSnapshotUndoRemember:
 * @driver: qemu driver
 * @vm: active domain, in a snapshot job
 * @snapdef: definition of an external snapshot with memory
 * @reuse: whether the overlays' files are the user's
 *
 * To be called before anything of the snapshot exists: until
 * qemuSnapshotUndoForget() it is undone by the next daemon if this one ends.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotUndoRemember(virQEMUDriver *driver,
                         virDomainObj *vm,
                         virDomainSnapshotDef *snapdef,
                         bool reuse)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    size_t i;

    if (priv->snapshotBackground) {
        virReportError(VIR_ERR_OPERATION_INVALID,
                       _("another snapshot of domain '%1$s' is not undone yet"),
                       vm->def->name);
        return -1;
    }

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;

        /* To undo it would merge the disk itself. */
        if (snapdisk->snapshot == VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL &&
            qemuSnapshotUndoLookAt(vm->def, snapdef, snapdisk) !=
            QEMU_SNAPSHOT_UNDO_OVERLAY_UNUSED) {
            virReportError(VIR_ERR_CONFIG_UNSUPPORTED,
                           _("overlay '%1$s' is in use by domain '%2$s'"),
                           NULLSTR(snapdisk->src->path), vm->def->name);
            return -1;
        }
    }

    priv->snapshotBackground = virObjectRef(snapdef);
    priv->snapshotBackgroundReuse = reuse;
    priv->snapshotBackgroundKeepImage = virFileExists(snapdef->memorysnapshotfile);
    priv->snapshotBackgroundNodes = priv->nodenameindex;
    priv->snapshotBackgroundAhead = true;

    if (virDomainObjSave(vm, driver->xmlopt, cfg->stateDir) < 0) {
        qemuSnapshotUndoDrop(vm);
        return -1;
    }

    return 0;
}


/* As qemuProcessStop() would have done. */
static void
qemuSnapshotUndoRemoveStatus(virQEMUDriver *driver,
                             virDomainObj *vm)
{
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    g_autofree char *status = g_strdup_printf("%s/%s.xml", cfg->stateDir,
                                              vm->def->name);

    if (unlink(status) < 0 && errno != ENOENT)
        VIR_WARN("Cannot remove '%s'", status);
}


/**
 * qemuSnapshotUndoForget:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 *
 * The snapshot is complete, or nothing is left of it. Does nothing if there
 * was none.
 */
void
qemuSnapshotUndoForget(virQEMUDriver *driver,
                       virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    if (!priv->snapshotBackground)
        return;

    qemuSnapshotUndoDrop(vm);

    if (virDomainObjIsActive(vm))
        qemuDomainSaveStatus(vm);
    else
        qemuSnapshotUndoRemoveStatus(driver, vm);
}


/**
 * qemuSnapshotUndoEnd:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 * @result: of qemuSnapshotUndo()
 *
 * To be called after it. If it has failed, the next snapshot, or the next
 * daemon, tries again; but not once QEMU has ended.
 */
void
qemuSnapshotUndoEnd(virQEMUDriver *driver,
                    virDomainObj *vm,
                    int result)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    qemuDomainJobPrivate *jobPriv = vm->job->privateData;

    jobPriv->snapshotDelete = false;

    if (!priv->snapshotBackground)
        return;

    if (result == 0 || !virDomainObjIsActive(vm)) {
        qemuSnapshotUndoForget(driver, vm);
        return;
    }

    priv->snapshotBackgroundFailed = true;
    priv->snapshotBackgroundAhead = false;
    qemuDomainSaveStatus(vm);
}


/**
 * qemuSnapshotUndoRetry:
 * @driver: qemu driver
 * @vm: active domain, in a snapshot job
 *
 * Undo what an undo that failed has left. Does nothing if there is nothing.
 *
 * Returns 0 if nothing is left, -1 on error.
 */
int
qemuSnapshotUndoRetry(virQEMUDriver *driver,
                      virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virDomainSnapshotDef) snapdef = virObjectRef(priv->snapshotBackground);
    int rc;

    if (!snapdef)
        return 0;

    priv->snapshotBackgroundAhead = true;
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK);

    if ((rc = qemuSnapshotUndoLeft(driver, vm)) < 0) {
        g_autofree char *why = g_strdup(virGetLastErrorMessage());

        virReportError(VIR_ERR_OPERATION_FAILED,
                       _("the overlays of snapshot '%1$s', which has failed, could not be merged back: %2$s"),
                       snapdef->parent.name, why);
    }

    qemuSnapshotUndoEnd(driver, vm, rc);
    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_NONE);

    if (rc < 0)
        return -1;

    return virDomainObjCheckActive(vm);
}


/* Until QEMU has ended the jobs of an undo in which the daemon ended: they are
 * cancelled by now. */
static void
qemuSnapshotUndoWaitBlockJobs(virDomainObj *vm)
{
    g_autoptr(virDomainSnapshotDef) snapdef =
        virObjectRef(QEMU_DOMAIN_PRIVATE(vm)->snapshotBackground);
    size_t patience = QEMU_SNAPSHOT_UNDO_PATIENCE;
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


/**
 * qemuSnapshotUndoRecoverJob:
 * @vm: domain that has the notes of a snapshot
 * @job: what it did when the daemon ended
 *
 * To be called before that job is recovered, and the domain is resumed.
 */
void
qemuSnapshotUndoRecoverJob(virDomainObj *vm,
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
 * qemuSnapshotUndoRecover:
 * @driver: qemu driver
 * @vm: domain, without a job
 *
 * Undo a snapshot that was being taken when the daemon ended.
 */
void
qemuSnapshotUndoRecover(virQEMUDriver *driver,
                        virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(qemuMigrationParams) params = NULL;
    int rc = 0;

    if (!priv->snapshotBackground)
        return;

    /* Their events need a job of their own. */
    if (!priv->snapshotBackgroundFailed)
        qemuSnapshotUndoWaitBlockJobs(vm);

    if (virDomainObjBeginAsyncJob(vm, VIR_ASYNC_JOB_SNAPSHOT,
                                  VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, 0) < 0) {
        VIR_WARN("Cannot undo a snapshot of domain '%s'", vm->def->name);
        qemuSnapshotUndoEnd(driver, vm, -1);
        return;
    }

    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK);

    if (priv->snapshotBackground &&
        (rc = qemuSnapshotUndoLeft(driver, vm)) < 0)
        VIR_WARN("Domain '%s' keeps overlays of a snapshot that was not completed",
                 vm->def->name);

    if (virDomainObjIsActive(vm) &&
        (!(params = qemuMigrationParamsNew()) ||
         qemuMigrationParamsApply(vm, VIR_ASYNC_JOB_SNAPSHOT, params, 0) < 0))
        VIR_WARN("Domain '%s' keeps migration capabilities", vm->def->name);

    qemuSnapshotUndoEnd(driver, vm, rc);

    virDomainObjEndAsyncJob(vm);
}

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


/* How long to wait for QEMU's end, in steps of 10 ms; and how much longer, when
 * its process has ended: then that is to come, though who sees to it may have
 * to wait for jobs of other events. */
#define QEMU_SNAPSHOT_UNDO_PATIENCE 3000
#define QEMU_SNAPSHOT_UNDO_PATIENCE_ENDED 20


/**
 * qemuSnapshotUndoLookAt:
 * @def: live definition of a domain that runs, or has just run
 * @snapdef: definition of an external snapshot that was not completed
 * @snapdisk: what it was to make of a disk
 *
 * Returns what the domain uses the file for that was to be the overlay. It is
 * unused only if its disk is the one that there was before.
 */
qemuSnapshotUndoOverlay
qemuSnapshotUndoLookAt(virDomainDef *def,
                       virDomainSnapshotDef *snapdef,
                       virDomainSnapshotDiskDef *snapdisk)
{
    virDomainDiskDef *disk = virDomainDiskByTarget(def, snapdisk->name);
    virDomainDiskDef *base = qemuSnapshotDiskGetBase(snapdef, snapdisk);
    size_t i;

    if (!disk || virDomainDiskTranslateSourcePool(disk) < 0)
        return QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP;

    if (qemuSnapshotDiskIsOverlay(disk, snapdef, snapdisk))
        return QEMU_SNAPSHOT_UNDO_OVERLAY_TOP;

    /* It may have been the disk until the user made that something else. */
    if (!base || !virStorageSourceIsSameLocation(disk->src, base->src))
        return QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP;

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
    priv->snapshotBackgroundRetried = false;
    priv->snapshotBackgroundAhead = false;
    priv->snapshotBackgroundUnlocked = false;
}


/**
 * qemuSnapshotUndoStopped:
 * @vm: domain that has ended, but still has its live definition
 * @reason: why
 *
 * Note what an undo has to know of that definition. If there is nobody to do
 * it, or the domain goes on elsewhere or from something else, forget it: it
 * keeps its overlays. To be called before its status is removed.
 */
void
qemuSnapshotUndoStopped(virDomainObj *vm,
                        virDomainShutoffReason reason)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    virDomainSnapshotDef *snapdef = priv->snapshotBackground;
    size_t i;

    if (!snapdef)
        return;

    if (!qemuSnapshotUndoIsAhead(vm) ||
        reason == VIR_DOMAIN_SHUTOFF_MIGRATED ||
        reason == VIR_DOMAIN_SHUTOFF_SAVED ||
        reason == VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT) {
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


/* Whether QEMU has ended, or is about to; libvirt may not know of it yet: the
 * monitor tells before the worker knows, and long before the process ends that
 * has much memory. */
static bool
qemuSnapshotUndoIsEnding(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    bool reboots = priv->fakeReboot ||
        vm->def->onPoweroff == VIR_DOMAIN_LIFECYCLE_ACTION_RESTART;

    return priv->beingDestroyed || !priv->mon || qemuMonitorHasEnded(priv->mon) ||
        (!reboots && virDomainObjGetState(vm, NULL) == VIR_DOMAIN_SHUTDOWN) ||
        virProcessKill(vm->pid, 0) < 0;
}


/**
 * qemuSnapshotUndoWaitStopped:
 * @vm: domain, in a snapshot job
 *
 * If QEMU is about to end, wait until qemuProcessStop(), in another thread, has
 * done all of its work.
 */
void
qemuSnapshotUndoWaitStopped(virDomainObj *vm)
{
    size_t patience = QEMU_SNAPSHOT_UNDO_PATIENCE * QEMU_SNAPSHOT_UNDO_PATIENCE_ENDED;

    while (virDomainObjIsActive(vm) && patience > 0 &&
           qemuSnapshotUndoIsEnding(vm)) {
        virObjectUnlock(vm);
        g_usleep(10 * 1000);
        virObjectLock(vm);
        patience -= virProcessKill(vm->pid, 0) < 0 ? 1 : QEMU_SNAPSHOT_UNDO_PATIENCE_ENDED;
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
    virDomainState state;
    int reason;

    priv->snapshotBackgroundResume = false;

    if (!virDomainObjIsActive(vm) || priv->snapshotBackgroundPanic)
        return 0;

    state = virDomainObjGetState(vm, &reason);

    /* QEMU has done it before it was told to. */
    if (state == VIR_DOMAIN_RUNNING && priv->snapshotBackgroundUnlocked &&
        qemuProcessStartCPUsPrepare(driver, vm, VIR_DOMAIN_RUNNING_UNPAUSED) < 0) {
        ignore_value(qemuProcessStopCPUs(driver, vm, VIR_DOMAIN_PAUSED_API_ERROR,
                                         VIR_ASYNC_JOB_SNAPSHOT));
        return -1;
    }

    if (state != VIR_DOMAIN_PAUSED ||
        (!resume && reason != VIR_DOMAIN_PAUSED_SNAPSHOT))
        return 0;

    /* QEMU may have done it, but its event be still on its way: that does no
     * harm. */
    if (qemuProcessStartCPUs(driver, vm, VIR_DOMAIN_RUNNING_UNPAUSED,
                             VIR_ASYNC_JOB_SNAPSHOT) == 0)
        return 0;

    if (!qemuDomainObjIsActive(vm))
        return -1;

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
 * qemuSnapshotUndoRemember() was told of, unless it is to keep its overlays, or
 * has other disks by now; if the domain has ended meanwhile, its definition and
 * its files. Remove the image.
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

        /* meanwhile */
        if (ret < 0)
            qemuSnapshotUndoWaitStopped(vm);

        if (!virDomainObjIsActive(vm))
            ret = qemuSnapshotFilesMerge(driver, vm, snapdef);
    }

    return ret;
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
 * @snapdef: what was to be undone; the caller holds a reference
 * @result: of qemuSnapshotUndo()
 *
 * To be called after it. If it has failed, the next snapshot, or the next
 * daemon, tries again; but not once QEMU has ended. Another snapshot that may
 * be going on since is left alone.
 */
void
qemuSnapshotUndoEnd(virQEMUDriver *driver,
                    virDomainObj *vm,
                    virDomainSnapshotDef *snapdef,
                    int result)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    qemuDomainJobPrivate *jobPriv = vm->job->privateData;

    jobPriv->snapshotDelete = false;

    if (!priv->snapshotBackground || priv->snapshotBackground != snapdef)
        return;

    if (result == 0 || !virDomainObjIsActive(vm)) {
        qemuSnapshotUndoForget(driver, vm);
        return;
    }

    priv->snapshotBackgroundFailed = true;
    priv->snapshotBackgroundRetried = true;
    priv->snapshotBackgroundAhead = false;
    qemuDomainSaveStatus(vm);
}

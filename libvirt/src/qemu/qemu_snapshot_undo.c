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
#include "qemu_saveimage.h"
#include "qemu_snapshot.h"

#include "snapshot_conf.h"
#include "virerror.h"
#include "virfile.h"
#include "virlog.h"
#include "virprocess.h"

#define VIR_FROM_THIS VIR_FROM_QEMU

VIR_LOG_INIT("qemu.qemu_snapshot_undo");


/* Without QEMU: by qemu-img, and in the definition if there is one. */
static int
qemuSnapshotUndoMergeFile(virQEMUDriver *driver,
                          virDomainObj *vm,
                          virDomainSnapshotDef *snapdef,
                          virDomainSnapshotDiskDef *snapdisk,
                          bool keepFiles)
{
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    virDomainDiskDef *disk = virDomainDiskByTarget(vm->def, snapdisk->name);
    bool used = disk && virStorageSourceIsSameLocation(disk->src, snapdisk->src);
    virDomainDiskDef *old = NULL;
    g_autoptr(virCommand) cmd = NULL;
    uid_t uid;
    gid_t gid;
    struct stat sb;

    /* What is in a file of the user's is not the guest's yet. */
    if (keepFiles && !used)
        return 0;

    if (snapdef->parent.inactiveDom)
        old = virDomainDiskByTarget(snapdef->parent.inactiveDom, snapdisk->name);
    if (!old)
        old = virDomainDiskByTarget(snapdef->parent.dom, snapdisk->name);

    if (!old || !virStorageSourceIsLocalStorage(snapdisk->src)) {
        virReportError(VIR_ERR_OPERATION_UNSUPPORTED,
                       _("overlay of disk '%1$s' cannot be merged without QEMU"),
                       snapdisk->name);
        return -1;
    }

    if (stat(snapdisk->src->path, &sb) == 0) {
        /* An empty file is one that QEMU was still to create an image in. */
        if (!S_ISREG(sb.st_mode) || sb.st_size > 0) {
            cmd = virCommandNewArgList("qemu-img", "commit", "-q", "-f",
                                       virStorageFileFormatTypeToString(snapdisk->src->format),
                                       snapdisk->src->path, NULL);
            qemuDomainGetImageIds(cfg, vm->def, snapdisk->src, NULL, &uid, &gid);
            virCommandSetUID(cmd, uid);
            virCommandSetGID(cmd, gid);
            if (virCommandRun(cmd, NULL) < 0)
                return -1;
        }
    } else if (errno != ENOENT) {
        virReportSystemError(errno, _("cannot access overlay '%1$s'"),
                             snapdisk->src->path);
        return -1;
    }

    if (used) {
        virStorageSource *src = virStorageSourceCopy(old->src, true);

        if (!src)
            return -1;
        virObjectUnref(disk->src);
        disk->src = src;
    }

    if (!keepFiles && snapdisk->src->type == VIR_STORAGE_TYPE_FILE &&
        unlink(snapdisk->src->path) < 0 && errno != ENOENT) {
        virReportSystemError(errno, _("cannot remove overlay '%1$s'"),
                             snapdisk->src->path);
        return -1;
    }

    return 0;
}


static int
qemuSnapshotUndoMergeFiles(virQEMUDriver *driver,
                           virDomainObj *vm,
                           virDomainSnapshotDef *snapdef,
                           bool keepFiles)
{
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    size_t i;
    int ret = 0;

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;

        if (snapdisk->snapshot == VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL &&
            qemuSnapshotUndoMergeFile(driver, vm, snapdef, snapdisk,
                                      keepFiles) < 0)
            ret = -1;
    }

    if (vm->persistent &&
        virDomainDefSave(vm->def, driver->xmlopt, cfg->configDir) < 0)
        ret = -1;

    return ret;
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

    while (virDomainObjIsActive(vm) &&
           (priv->beingDestroyed || !qemuSnapshotUndoHasQEMU(vm))) {
        virObjectUnlock(vm);
        g_usleep(10 * 1000);
        virObjectLock(vm);
    }

    if (virDomainObjBeginNestedJob(vm, VIR_ASYNC_JOB_SNAPSHOT) == 0)
        virDomainObjEndJob(vm);
}


/**
 * qemuSnapshotUndoRemember:
 * @vm: active domain, in a snapshot job
 * @snapdef: definition of an external snapshot
 * @reuse: whether the overlays' files are the user's
 *
 * To be called before anything of the snapshot exists: until
 * qemuSnapshotUndoForget() it is undone by the next daemon if this one ends.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotUndoRemember(virDomainObj *vm,
                         virDomainSnapshotDef *snapdef,
                         bool reuse)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    size_t i;

    if (priv->snapshotBackground) {
        virReportError(VIR_ERR_OPERATION_INVALID,
                       _("a snapshot of domain '%1$s' is still to be undone"),
                       vm->def->name);
        return -1;
    }

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;
        virDomainDiskDef *disk = virDomainDiskByTarget(vm->def, snapdisk->name);
        virStorageSource *src;

        if (snapdisk->snapshot != VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL || !disk)
            continue;

        /* To undo it would merge the disk itself. */
        for (src = disk->src; src; src = src->backingStore) {
            if (virStorageSourceIsSameLocation(src, snapdisk->src)) {
                virReportError(VIR_ERR_CONFIG_UNSUPPORTED,
                               _("overlay '%1$s' is in use by disk '%2$s'"),
                               NULLSTR(src->path), disk->dst);
                return -1;
            }
        }
    }

    priv->snapshotBackground = virObjectRef(snapdef);
    priv->snapshotBackgroundReuse = reuse;
    priv->snapshotBackgroundNodes = priv->nodenameindex;
    qemuDomainSaveStatus(vm);

    return 0;
}


/**
 * qemuSnapshotUndoForget:
 * @vm: domain, in a snapshot job
 *
 * The snapshot is complete, or nothing is left of it.
 */
void
qemuSnapshotUndoForget(virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    g_clear_pointer(&priv->snapshotBackground, virObjectUnref);
    if (virDomainObjIsActive(vm))
        qemuDomainSaveStatus(vm);
}


/**
 * qemuSnapshotUndo:
 * @driver: qemu driver
 * @vm: domain, in a snapshot job
 *
 * Give the domain the disks back that it had before the snapshot which
 * vm->privateData->snapshotBackground describes; if the domain has ended
 * meanwhile, its definition and its files.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotUndo(virQEMUDriver *driver,
                 virDomainObj *vm)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    virDomainSnapshotDef *snapdef = priv->snapshotBackground;
    qemuDomainJobPrivate *jobPriv = vm->job->privateData;
    bool keepFiles = priv->snapshotBackgroundReuse;
    int ret = 0;

    /* The next daemon cancels the block jobs, and tries again. */
    jobPriv->snapshotDelete = true;

    if (cfg->snapshotMemoryKeepOverlays) {
        VIR_INFO("Leaving domain '%s' with the overlays of a failed snapshot",
                 vm->def->name);
    } else {
        qemuSnapshotUndoWaitStopped(vm);

        if (virDomainObjIsActive(vm))
            ret = qemuSnapshotMergeOverlays(vm, snapdef, keepFiles);

        /* QEMU may have ended meanwhile: its monitor tells before the worker
         * knows. */
        if (ret < 0 && !qemuSnapshotUndoHasQEMU(vm))
            qemuSnapshotUndoWaitStopped(vm);

        if (!virDomainObjIsActive(vm))
            ret = qemuSnapshotUndoMergeFiles(driver, vm, snapdef, keepFiles);
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
                              virDomainSnapshotDef *snapdef,
                              bool keepFiles)
{
    bool used = qemuSnapshotUndoDeleteNodes(vm) != 1;
    size_t i;
    int ret = 0;

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;
        virDomainDiskDef *disk = virDomainDiskByTarget(vm->def, snapdisk->name);
        struct stat sb;

        if (snapdisk->snapshot != VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL ||
            (disk && virStorageSourceIsSameLocation(disk->src, snapdisk->src)))
            continue;

        if (used) {
            VIR_WARN("QEMU may use overlay '%s' of domain '%s'",
                     NULLSTR(snapdisk->src->path), vm->def->name);
            ret = -1;
            continue;
        }

        qemuDomainStorageSourceAccessRevoke(driver, vm, snapdisk->src);

        if (!keepFiles && virStorageSourceIsLocalStorage(snapdisk->src) &&
            stat(snapdisk->src->path, &sb) == 0 && S_ISREG(sb.st_mode) &&
            unlink(snapdisk->src->path) < 0) {
            virReportSystemError(errno, _("cannot remove overlay '%1$s'"),
                                 snapdisk->src->path);
            ret = -1;
        }
    }

    return ret;
}


/* Until QEMU has ended the jobs of an undo in which the daemon ended: they are
 * cancelled by now. */
static void
qemuSnapshotUndoWaitBlockJobs(virDomainObj *vm)
{
    virDomainSnapshotDef *snapdef = QEMU_DOMAIN_PRIVATE(vm)->snapshotBackground;
    size_t patience = 3000;
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
    g_autoptr(virDomainSnapshotDef) snapdef = NULL;
    g_autoptr(qemuMigrationParams) params = NULL;
    bool keepFiles = priv->snapshotBackgroundReuse;
    bool known;

    if (!priv->snapshotBackground)
        return;

    snapdef = virObjectRef(priv->snapshotBackground);
    /* Their events need a job of their own. */
    qemuSnapshotUndoWaitBlockJobs(vm);

    if (virDomainObjBeginAsyncJob(vm, VIR_ASYNC_JOB_SNAPSHOT,
                                  VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, 0) < 0) {
        VIR_WARN("Cannot undo a snapshot of domain '%s'", vm->def->name);
        return;
    }

    qemuDomainObjSetAsyncJobMask(vm, VIR_JOB_DEFAULT_MASK);

    known = !virDomainObjIsActive(vm) ||
        qemuSnapshotDetectOverlays(vm, snapdef, VIR_ASYNC_JOB_SNAPSHOT) == 0;

    if (qemuSnapshotUndo(driver, vm) < 0 || !known ||
        (virDomainObjIsActive(vm) &&
         qemuSnapshotUndoDiscardUnused(driver, vm, snapdef, keepFiles) < 0))
        VIR_WARN("Domain '%s' keeps overlays of a snapshot that was not completed",
                 vm->def->name);
    qemuSnapshotUndoForget(vm);

    if (virDomainObjIsActive(vm) &&
        (!(params = qemuMigrationParamsNew()) ||
         qemuMigrationParamsApply(vm, VIR_ASYNC_JOB_SNAPSHOT, params, 0) < 0))
        VIR_WARN("Domain '%s' keeps migration capabilities", vm->def->name);

    if (qemuSaveImageIsPartial(driver, snapdef->memorysnapshotfile) &&
        unlink(snapdef->memorysnapshotfile) < 0)
        VIR_WARN("Cannot remove incomplete image '%s'",
                 snapdef->memorysnapshotfile);

    virDomainObjEndAsyncJob(vm);
}

/*
 * qemu_snapshot_files.c: undo external snapshots of domains that have ended
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

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
# include <sys/prctl.h>
#endif

#include "qemu_snapshot_files.h"

#include "qemu_domain.h"
#include "qemu_snapshot.h"

#include "snapshot_conf.h"
#include "virerror.h"
#include "virfile.h"
#include "virlog.h"

#define VIR_FROM_THIS VIR_FROM_QEMU

VIR_LOG_INIT("qemu.qemu_snapshot_files");


/* The next daemon does it again, and is not to find the file in use. */
static int
qemuSnapshotFilesDieWithUs(void *opaque G_GNUC_UNUSED)
{
#ifdef __linux__
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return -1;
#endif
    return 0;
}


/* Returns 1 if the file is there, 0 if it is not, -1 if that is not known. */
static int
qemuSnapshotFilesHas(const char *path,
                     uid_t uid,
                     gid_t gid)
{
    struct stat sb;

    if (stat(path, &sb) == 0)
        return 1;

    /* Where root may not look, the owner may. */
    if (errno != ENOENT && virFileAccessibleAs(path, F_OK, uid, gid) == 0)
        return 1;

    if (errno == ENOENT)
        return 0;

    virReportSystemError(errno, _("cannot access '%1$s'"), path);
    return -1;
}


/* Whether the name and the format are all that there is to know of an image. */
static bool
qemuSnapshotFilesIsPlain(virStorageSource *image)
{
    virStorageSource *src;

    for (src = image; virStorageSourceIsBacking(src); src = src->backingStore) {
        if (src->encryption || src->sliceStorage || src->fdgroup)
            return false;
    }

    return virStorageSourceIsLocalStorage(image);
}


/* By qemu-img. Gives up the lock of @vm. */
static int
qemuSnapshotFilesCommit(virQEMUDriver *driver,
                        virDomainObj *vm,
                        virStorageSource *overlay,
                        virStorageSource *base,
                        bool isDisk)
{
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    const char *format = virStorageFileFormatTypeToString(overlay->format);
    g_autoptr(virCommand) rebase = NULL;
    g_autoptr(virCommand) commit = NULL;
    virCommand *cmds[2];
    struct stat sb;
    uid_t uid;
    gid_t gid;
    size_t i;
    int rc = 0;

    /* qemu-img would be told too little of what a part of a file is, or one that
     * is encrypted: it would write where, and what, it should not. */
    if (!qemuSnapshotFilesIsPlain(overlay) || !qemuSnapshotFilesIsPlain(base)) {
        virReportError(VIR_ERR_OPERATION_UNSUPPORTED,
                       _("overlay '%1$s' cannot be merged without QEMU"),
                       NULLSTR(overlay->path));
        return -1;
    }

    qemuDomainGetImageIds(cfg, vm->def, overlay, NULL, &uid, &gid);

    /* Both are gone if it is their file system that is gone. */
    if ((rc = qemuSnapshotFilesHas(base->path, uid, gid)) <= 0) {
        if (rc == 0)
            virReportSystemError(ENOENT, _("cannot access '%1$s'"), base->path);
        return -1;
    }
    if ((rc = qemuSnapshotFilesHas(overlay->path, uid, gid)) <= 0) {
        /* What was merged before is not the definition's any more. */
        if (rc == 0 && isDisk) {
            virReportSystemError(ENOENT, _("cannot access '%1$s'"), overlay->path);
            return -1;
        }
        return rc;
    }
    rc = 0;

    /* QEMU was told what is below it; the file may say something else. */
    rebase = virCommandNewArgList("qemu-img", "rebase", "-q", "-u", "-f", format,
                                  "-F", virStorageFileFormatTypeToString(base->format),
                                  "-b", base->path, overlay->path, NULL);
    commit = virCommandNewArgList("qemu-img", "commit", "-q", "-f", format,
                                  overlay->path, NULL);
    cmds[0] = rebase;
    cmds[1] = commit;

    virObjectUnlock(vm);
    for (i = 0; i < G_N_ELEMENTS(cmds) && rc == 0; i++) {
        /* Labels are restored by now: there root may not do it. */
        if (virFileIsSharedFS(overlay->path, cfg->sharedFilesystems) == 1) {
            virCommandSetUID(cmds[i], uid);
            virCommandSetGID(cmds[i], gid);
        }
        virCommandSetPreExecHook(cmds[i], qemuSnapshotFilesDieWithUs, NULL);
        rc = virCommandRun(cmds[i], NULL);
    }
    virObjectLock(vm);

    /* Whom the disk belonged to was remembered, and restored, for the file
     * that was the disk. */
    if (rc == 0 && driver->privileged && cfg->dynamicOwnership &&
        stat(overlay->path, &sb) == 0 &&
        chown(base->path, sb.st_uid, sb.st_gid) < 0)
        VIR_WARN("Cannot restore the owner of '%s'", base->path);

    return rc;
}


/* To be called whenever the lock was given up: autodestroy takes the job away,
 * and then the domain may be started. */
static int
qemuSnapshotFilesCheck(virDomainObj *vm,
                       virDomainSnapshotDef *snapdef)
{
    qemuDomainObjPrivate *priv = vm->privateData;

    if (!virDomainObjIsActive(vm) && priv->snapshotBackground == snapdef &&
        priv->snapshotBackgroundOverlays)
        return 0;

    virReportError(VIR_ERR_OPERATION_INVALID,
                   _("domain '%1$s' was started"), vm->def->name);
    return -1;
}


/* The file, and the definition if there is one. */
static int
qemuSnapshotFilesMergeOne(virQEMUDriver *driver,
                          virDomainObj *vm,
                          virDomainSnapshotDef *snapdef,
                          virDomainSnapshotDiskDef *snapdisk,
                          qemuSnapshotUndoOverlay overlay)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    g_autoptr(virQEMUDriverConfig) cfg = virQEMUDriverGetConfig(driver);
    /* what the overlay is above, and what the definition is to have */
    virDomainDiskDef *base = qemuSnapshotDiskGetBase(snapdef, snapdisk);
    virDomainDiskDef *old = NULL;
    virDomainDiskDef *disk = NULL;
    uid_t uid;
    gid_t gid;

    /* After an undo that failed, the user may have made it so, and it may hold
     * what the guest has written. */
    if (overlay == QEMU_SNAPSHOT_UNDO_OVERLAY_UNUSED &&
        priv->snapshotBackgroundRetried)
        return 0;

    if (overlay == QEMU_SNAPSHOT_UNDO_OVERLAY_KEEP) {
        virReportError(VIR_ERR_OPERATION_UNSUPPORTED,
                       _("overlay '%1$s' may be in use"),
                       NULLSTR(snapdisk->src->path));
        return -1;
    }

    if (snapdef->parent.inactiveDom)
        old = virDomainDiskByTarget(snapdef->parent.inactiveDom, snapdisk->name);
    if (!old)
        old = base;
    if (!base) {
        virReportError(VIR_ERR_INTERNAL_ERROR,
                       _("there was no disk '%1$s'"), snapdisk->name);
        return -1;
    }

    disk = virDomainDiskByTarget(vm->def, snapdisk->name);

    if (overlay == QEMU_SNAPSHOT_UNDO_OVERLAY_TOP) {
        bool isDisk = disk && virStorageSourceIsSameLocation(disk->src,
                                                             snapdisk->src);

        if (qemuSnapshotFilesCommit(driver, vm, snapdisk->src, base->src,
                                    isDisk) < 0 ||
            qemuSnapshotFilesCheck(vm, snapdef) < 0)
            return -1;

        disk = virDomainDiskByTarget(vm->def, snapdisk->name);
    }

    if (disk && virStorageSourceIsSameLocation(disk->src, snapdisk->src)) {
        virStorageSource *src = virStorageSourceCopy(old->src, true);

        if (!src)
            return -1;
        virObjectUnref(disk->src);
        disk->src = src;

        if (vm->persistent &&
            virDomainDefSave(vm->def, driver->xmlopt, cfg->configDir) < 0)
            return -1;
    }

    qemuDomainGetImageIds(cfg, vm->def, snapdisk->src, NULL, &uid, &gid);

    if (!priv->snapshotBackgroundReuse &&
        snapdisk->src->type == VIR_STORAGE_TYPE_FILE &&
        virFileRemove(snapdisk->src->path, uid, gid) < 0 && errno != ENOENT) {
        virReportSystemError(errno, _("cannot remove overlay '%1$s'"),
                             snapdisk->src->path);
        return -1;
    }

    return 0;
}


/**
 * qemuSnapshotFilesMerge:
 * @driver: qemu driver
 * @vm: locked domain that has ended, in a snapshot job; the lock is given up
 * @snapdef: definition of the snapshot; the caller holds a reference
 *
 * Merge its overlays, as far as vm->privateData notes that they were the disks,
 * into the disks that the domain had before, which its definition gets back;
 * remove them, but for the user's, and what may have become so.
 *
 * Returns 0 on success, -1 on error.
 */
int
qemuSnapshotFilesMerge(virQEMUDriver *driver,
                       virDomainObj *vm,
                       virDomainSnapshotDef *snapdef)
{
    qemuDomainObjPrivate *priv = vm->privateData;
    size_t i;
    int ret = 0;

    for (i = 0; i < snapdef->ndisks; i++) {
        virDomainSnapshotDiskDef *snapdisk = snapdef->disks + i;

        if (qemuSnapshotFilesCheck(vm, snapdef) < 0)
            return -1;

        if (snapdisk->snapshot == VIR_DOMAIN_SNAPSHOT_LOCATION_EXTERNAL &&
            qemuSnapshotFilesMergeOne(driver, vm, snapdef, snapdisk,
                                      priv->snapshotBackgroundOverlays[i]) < 0)
            ret = -1;
    }

    return ret;
}

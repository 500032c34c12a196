/*
 * Background snapshot: which VMs it can be taken of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "hw/virtio/vhost.h"
#include "qom/object.h"
#include "system/kvm.h"
#include "system/tcg.h"
#include "system/qtest.h"
#include "background-snapshot.h"
#include "ram.h"

/* QOM types whose devices let others write guest RAM behind QEMU's back */
static const char *const foreign_writers[] = {
    "vfio-pci-base",
    "vfio-ap",
    "vfio-ccw",
    "vfio-platform",
    "ivshmem-common",
    "x-pci-proxy-dev",
};

static int find_foreign_writer(Object *obj, void *opaque)
{
    Error **errp = opaque;
    size_t i;

    for (i = 0; i < ARRAY_SIZE(foreign_writers); i++) {
        if (object_dynamic_cast(obj, foreign_writers[i])) {
            g_autofree char *path = object_get_canonical_path(obj);

            error_setg(errp, "Background-snapshot is not possible with %s "
                       "(%s): its writes to guest RAM cannot be trapped",
                       path, object_get_typename(obj));
            return 1;
        }
    }
    return 0;
}

const WriteTrapOps *background_snapshot_choose_trap(Error **errp)
{
#ifdef CONFIG_POSIX
    if (!tcg_enabled() && !qtest_enabled()) {
        error_setg(errp, "Background-snapshot is not possible with this "
                   "accelerator: it does not tell which of the guest's writes "
                   "was stopped by the 'mprotect' write trap");
        return NULL;
    }
    return &write_trap_mprotect;
#else
    error_setg(errp, "Background-snapshot is not possible on this host: "
               "there is no write trap for it");
    return NULL;
#endif
}

bool background_snapshot_supported(Error **errp)
{
    if (!background_snapshot_choose_trap(errp)) {
        return false;
    }
    /* There is a limit only if there are vhost devices */
    if (vhost_get_max_memslots() != UINT_MAX) {
        error_setg(errp, "Background-snapshot is not possible with vhost "
                   "devices: their writes to guest RAM cannot be trapped");
        return false;
    }
    return !object_child_foreach_recursive(object_get_root(),
                                           find_foreign_writer, errp);
}

/*
 * Write traps made of userfaultfd write-protection: what they share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include "qapi/error.h"
#include "qemu/userfaultfd.h"
#include "write-trap-uffd.h"

/*
 * Linux 5.19 can protect memory that is not anonymous.  Linux 6.4 could also
 * protect anonymous memory that does not exist (WP_UNPOPULATED); but that costs
 * time and page tables, and the owner need not know of writes to it.
 */
#define OPTIONAL_FEATURES UFFD_FEATURE_WP_HUGETLBFS_SHMEM

/* Returns a userfaultfd with its features in @api, or -errno */
static int uffd_trap_try_open(int flags, struct uffdio_api *api)
{
    int fd = uffd_open(O_CLOEXEC | O_NONBLOCK | flags);
    int ret;

    if (fd < 0 && errno == EINVAL) {
        /* Linux before 5.11 knows no flags of its own */
        fd = uffd_open(O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0) {
        return -errno;
    }
    api->api = UFFD_API;
    if (ioctl(fd, UFFDIO_API, api) < 0) {
        ret = -errno;
        close(fd);
        return ret;
    }
    return fd;
}

/* Open the trap's userfaultfd with @features and the optional ones it has */
static bool uffd_trap_open(UffdTrap *trap, uint64_t features, int flags,
                           Error **errp)
{
    struct uffdio_api api = {};
    int fd = uffd_trap_try_open(flags, &api);

    if (fd >= 0) {
        /* That was to ask, which can be done but once for each descriptor */
        close(fd);
        if (features & ~api.features) {
            error_setg(errp, "The host's userfaultfd cannot write-protect "
                       "memory; Linux 5.7 can");
            return false;
        }
        api.features = features | (api.features & OPTIONAL_FEATURES);
        fd = uffd_trap_try_open(flags, &api);
    }
    if (fd < 0) {
        error_setg_errno(errp, -fd, "Cannot open userfaultfd (access to "
                         "/dev/userfaultfd or vm.unprivileged_userfaultfd=1 "
                         "may allow it)");
        return false;
    }
    trap->fd = fd;
    return true;
}

bool uffd_trap_init(UffdTrap *trap, const WriteTrapOps *ops, uint64_t features,
                    int flags, Error **errp)
{
#ifndef HOST_X86_64
    /*
     * Before Linux 5.14, other architectures promise it and do not have it.
     * This feature is newer, and those that have it got it later still.
     */
    features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
#endif
    trap->common.ops = ops;
    trap->common.max_islands = SIZE_MAX;
    return uffd_trap_open(trap, UFFD_FEATURE_PAGEFAULT_FLAG_WP | features,
                          flags, errp);
}

void uffd_trap_cleanup(UffdTrap *trap)
{
    /* Closing it unregisters the ranges as well */
    close(trap->fd);
}

bool uffd_trap_add(WriteTrap *common, void *host, size_t size, Error **errp)
{
    UffdTrap *trap = container_of(common, UffdTrap, common);
    uint64_t ioctls;

    if (uffd_register_memory(trap->fd, host, size, UFFDIO_REGISTER_MODE_WP,
                             &ioctls) < 0 ||
        !(ioctls & (UINT64_C(1) << _UFFDIO_WRITEPROTECT))) {
        error_setg(errp, "The host's userfaultfd cannot write-protect this "
                   "kind of memory; Linux 5.7 can if it is anonymous, and "
                   "Linux 5.19 if it is in shmem (memfd, tmpfs) or hugetlbfs");
        return false;
    }
    return true;
}

static int uffd_trap_protect(WriteTrap *common, void *host, size_t size,
                             uint64_t mode)
{
    UffdTrap *trap = container_of(common, UffdTrap, common);
    struct uffdio_writeprotect wp = {
        .range = { .start = (uintptr_t)host, .len = size },
        .mode = mode,
    };

    /* EAGAIN: the process is changing its mappings at the moment */
    while (ioctl(trap->fd, UFFDIO_WRITEPROTECT, &wp) < 0) {
        if (errno != EAGAIN) {
            return -errno;
        }
    }
    return 0;
}

bool uffd_trap_arm(WriteTrap *common, void *host, size_t size, Error **errp)
{
    int ret = uffd_trap_protect(common, host, size,
                                UFFDIO_WRITEPROTECT_MODE_WP);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write-protect %zu bytes", size);
    }
    return ret == 0;
}

int uffd_trap_release(WriteTrap *common, void *host, size_t size)
{
    UffdTrap *trap = container_of(common, UffdTrap, common);
    int ret = uffd_trap_protect(common, host, size, 0);

    /*
     * A part was mapped anew, as memory that the host has lost is, and nothing
     * protects it any more.  This passes over such parts.
     */
    if (ret == -ENOENT) {
        uffd_unregister_memory(trap->fd, host, size);
        uffd_wakeup(trap->fd, host, size);
        ret = 0;
    }
    return ret;
}

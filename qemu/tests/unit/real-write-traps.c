/*
 * The write traps that there are, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#ifdef CONFIG_LINUX
#include <sys/ioctl.h>
#include "qemu/userfaultfd.h"
#endif
#include "qapi/error.h"
#include "real-write-traps.h"

const WriteTrapOps *const real_traps[] = {
    &write_trap_mprotect,
#ifdef CONFIG_LINUX
    &write_trap_uffd_signal,
    &write_trap_uffd_thread,
#endif
    NULL
};

bool real_trap_available(const WriteTrapOps *ops, Error **errp)
{
    WriteTrap *trap = ops->new(NULL, 0, NULL, NULL, errp);

    if (trap) {
        ops->free(trap);
    }
    return trap;
}

bool real_trap_serves(const WriteTrapOps *ops, const MemoryKind *kind)
{
#ifdef CONFIG_LINUX
    if (ops != &write_trap_mprotect && kind->backing != MEMORY_ANONYMOUS) {
        struct uffdio_api api = { .api = UFFD_API };
        int fd = uffd_open(O_CLOEXEC | UFFD_USER_MODE_ONLY);

        if (fd < 0) {
            /* Linux before 5.11 */
            fd = uffd_open(O_CLOEXEC);
        }

        g_assert_cmpint(ioctl(fd, UFFDIO_API, &api), ==, 0);
        close(fd);
        return kind->backing != MEMORY_REGULAR &&
               (api.features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
    }
#endif
    return true;
}

void real_trap_skip(const void *ops)
{
    Error *err = NULL;

    g_assert_false(real_trap_available(ops, &err));
    g_test_skip(error_get_pretty(err));
    error_free(err);
}

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
#include "qemu/module.h"
#include "real-write-traps.h"

const WriteTrapOps *const *real_traps(void)
{
    /* Those of them that this build has */
    static const char *const names[] = {
        "mprotect", "uffd-signal", "uffd-thread"
    };
    static const WriteTrapOps *traps[ARRAY_SIZE(names) + 1];
    size_t i, n = 0;

    if (!traps[0]) {
        module_call_init(MODULE_INIT_MIGRATION);
    }
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        traps[n] = write_trap_find(names[i]);
        n += traps[n] != NULL;
    }
    return traps;
}

bool real_trap_is_uffd(const WriteTrapOps *ops)
{
    return g_str_has_prefix(ops->name, "uffd-");
}

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
    if (real_trap_is_uffd(ops) && kind->backing != MEMORY_ANONYMOUS) {
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

void real_traps_add_test(const char *prefix, const char *name,
                         GTestDataFunc fn)
{
    const WriteTrapOps *const *trap;

    for (trap = real_traps(); *trap; trap++) {
        g_autofree char *path = g_strdup_printf("%s/%s/%s", prefix,
                                                (*trap)->name, name);

        g_test_add_data_func(path, *trap, real_trap_available(*trap, NULL)
                                          ? fn : real_trap_skip);
    }
}

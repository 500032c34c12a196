/*
 * Write trap made of mprotect() and SIGSEGV
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Not for macOS, which sends SIGBUS.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/madvise.h"
#include "qemu/memory-fault.h"
#include "qemu/module.h"
#include "write-trap.h"

/* What Linux has had since 2.6; see Documentation/admin-guide/sysctl/vm.rst */
#define DEFAULT_MAX_MAP_COUNT 65530

typedef struct MprotectTrap {
    WriteTrap common;
    MemoryFaultHandler handler;
} MprotectTrap;

static const WriteTrapOps mprotect_trap_ops;

/* How many mappings the process may have */
static size_t mprotect_trap_max_maps(void)
{
    g_autofree char *text = NULL;
    uint64_t max;

    if (g_file_get_contents("/proc/sys/vm/max_map_count", &text, NULL, NULL) &&
        qemu_strtou64(g_strstrip(text), NULL, 10, &max) == 0) {
        return max;
    }
    return DEFAULT_MAX_MAP_COUNT;
}

/* How many mappings the process has */
static size_t mprotect_trap_count_maps(void)
{
    g_autofree char *text = NULL;
    size_t count = 0;
    const char *p;

    if (g_file_get_contents("/proc/self/maps", &text, NULL, NULL)) {
        for (p = text; (p = strchr(p, '\n')); p++) {
            count++;
        }
    }
    return count;
}

/*
 * An island is a mapping of its own and cuts the armed mapping around it in
 * two.  A quarter of what is free is left to the rest of the process.
 */
static size_t mprotect_trap_max_islands(void)
{
    size_t max = mprotect_trap_max_maps();
    size_t count = mprotect_trap_count_maps();

    return max > count ? (max - count) * 3 / 4 / 2 : 0;
}

static WriteTrap *mprotect_trap_new(void *start, size_t size,
                                    WriteTrapFaultFn *fault, void *opaque,
                                    Error **errp)
{
    MprotectTrap *trap = g_new0(MprotectTrap, 1);

    trap->common.ops = &mprotect_trap_ops;
    trap->common.max_islands = mprotect_trap_max_islands();
    trap->handler.signal = SIGSEGV;
    trap->handler.start = start;
    trap->handler.size = size;
    trap->handler.fn = fault;
    trap->handler.opaque = opaque;
    if (!memory_fault_handler_add(&trap->handler, errp)) {
        g_free(trap);
        return NULL;
    }
    return &trap->common;
}

static bool mprotect_trap_add(WriteTrap *trap, void *host, size_t size,
                              Error **errp)
{
    return true;
}

static void mprotect_trap_prepare(WriteTrap *trap, void *host)
{
    /*
     * Linux merges mappings only if they share their anon_vma, which memory
     * that nobody has written yet does not have: each island would get one of
     * its own.  With one page in use, all pieces share that page's.  Where
     * this fails, there are just more mappings than need be.
     */
    qemu_madvise(host, qemu_real_host_page_size(), QEMU_MADV_POPULATE_WRITE);
}

static bool mprotect_trap_arm(WriteTrap *trap, void *host, size_t size,
                              Error **errp)
{
    if (mprotect(host, size, PROT_READ) < 0) {
        error_setg_errno(errp, errno, "Cannot write-protect %zu bytes", size);
        return false;
    }
    return true;
}

static int mprotect_trap_release(WriteTrap *trap, void *host, size_t size)
{
    return mprotect(host, size, PROT_READ | PROT_WRITE) < 0 ? -errno : 0;
}

static void mprotect_trap_free(WriteTrap *trap)
{
    MprotectTrap *mprotect_trap = container_of(trap, MprotectTrap, common);

    memory_fault_handler_remove(&mprotect_trap->handler);
    g_free(mprotect_trap);
}

static const WriteTrapOps mprotect_trap_ops = {
    .name = "mprotect",
    .in_thread = true,
    .arms_untouched = true,
    .survives_merging = true,
    .new = mprotect_trap_new,
    .add = mprotect_trap_add,
    .prepare = mprotect_trap_prepare,
    .arm = mprotect_trap_arm,
    .release = mprotect_trap_release,
    .free = mprotect_trap_free,
};

static void mprotect_trap_register(void)
{
    write_trap_register(&mprotect_trap_ops);
}

migration_init(mprotect_trap_register)

/*
 * Write trap made of userfaultfd and SIGBUS in the writing thread
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/memory-fault.h"
#include "qemu/module.h"
#include "qemu/userfaultfd.h"
#include "write-trap-uffd.h"

typedef struct UffdSignalTrap {
    UffdTrap uffd;
    MemoryFaultHandler handler;
} UffdSignalTrap;

static const WriteTrapOps uffd_signal_trap_ops;

static WriteTrap *uffd_signal_trap_new(void *start, size_t size,
                                       WriteTrapFaultFn *fault, void *opaque,
                                       Error **errp)
{
    UffdSignalTrap *trap = g_new0(UffdSignalTrap, 1);

    /* The kernel's own faults fail in any case; so it needs no privilege */
    if (!uffd_trap_init(&trap->uffd, &uffd_signal_trap_ops,
                        UFFD_FEATURE_SIGBUS, UFFD_USER_MODE_ONLY, errp)) {
        g_free(trap);
        return NULL;
    }
    trap->handler.signal = SIGBUS;
    trap->handler.start = start;
    trap->handler.size = size;
    trap->handler.fn = fault;
    trap->handler.opaque = opaque;
    if (!memory_fault_handler_add(&trap->handler, errp)) {
        uffd_trap_cleanup(&trap->uffd);
        g_free(trap);
        return NULL;
    }
    return &trap->uffd.common;
}

static void uffd_signal_trap_free(WriteTrap *common)
{
    UffdSignalTrap *trap = container_of(common, UffdSignalTrap, uffd.common);

    memory_fault_handler_remove(&trap->handler);
    uffd_trap_cleanup(&trap->uffd);
    g_free(trap);
}

static const WriteTrapOps uffd_signal_trap_ops = {
    .name = "uffd-signal",
    .in_thread = true,
    .raises_sigbus = true,
    .new = uffd_signal_trap_new,
    .add = uffd_trap_add,
    .arm = uffd_trap_arm,
    .release = uffd_trap_release,
    .free = uffd_signal_trap_free,
};

static void uffd_signal_trap_register(void)
{
    write_trap_register(&uffd_signal_trap_ops);
}

migration_init(uffd_signal_trap_register)

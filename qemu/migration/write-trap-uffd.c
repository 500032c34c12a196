/*
 * Write traps made of userfaultfd write-protection
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Two traps, which differ in how a stopped write is delivered: as SIGBUS in
 * the writing thread, or as a message to threads of the trap's own.  Neither
 * splits the host's mappings, unlike mprotect().
 */
#include "qemu/osdep.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/event_notifier.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"
#include "qemu/userfaultfd.h"
#include "write-trap.h"

/*
 * Linux 5.19 can protect memory that is not anonymous.  Linux 6.4 could also
 * protect anonymous memory that does not exist (WP_UNPOPULATED); but that costs
 * time and page tables, and the owner need not know of writes to it.
 */
#define OPTIONAL_FEATURES UFFD_FEATURE_WP_HUGETLBFS_SHMEM

/*
 * Threads that read messages.  One that waits, for room in the owner's buffer
 * or for a page that another copies, leaves the rest to the others.
 */
#define NUM_THREADS 2

/* Messages that a thread reads at a time; it should leave some to the others */
#define MAX_MESSAGES 4

typedef struct UffdTrap {
    WriteTrap common;
    int fd;

    /* Delivery by SIGBUS */
    MemoryFaultHandler handler;

    /* Delivery by message */
    WriteTrapFaultFn *fault;
    void *opaque;
    EventNotifier quit;
    QemuThread threads[NUM_THREADS];
} UffdTrap;

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

static UffdTrap *uffd_trap_new(const WriteTrapOps *ops, uint64_t features,
                               int flags, Error **errp)
{
    UffdTrap *trap = g_new0(UffdTrap, 1);

#ifndef HOST_X86_64
    /*
     * Before Linux 5.14, other architectures promise it and do not have it.
     * This feature is newer, and those that have it got it later still.
     */
    features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
#endif
    trap->common.ops = ops;
    trap->common.max_islands = SIZE_MAX;
    if (!uffd_trap_open(trap, UFFD_FEATURE_PAGEFAULT_FLAG_WP | features, flags,
                        errp)) {
        g_free(trap);
        return NULL;
    }
    return trap;
}

static bool uffd_trap_add(WriteTrap *common, void *host, size_t size,
                          Error **errp)
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

static bool uffd_trap_arm(WriteTrap *common, void *host, size_t size,
                          Error **errp)
{
    int ret = uffd_trap_protect(common, host, size,
                                UFFDIO_WRITEPROTECT_MODE_WP);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot write-protect %zu bytes", size);
    }
    return ret == 0;
}

static int uffd_trap_release(WriteTrap *common, void *host, size_t size)
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

static void uffd_trap_free(UffdTrap *trap)
{
    /* Closing it unregisters the ranges as well */
    close(trap->fd);
    g_free(trap);
}

/* Delivery by SIGBUS in the writing thread */

static WriteTrap *uffd_signal_trap_new(void *start, size_t size,
                                       WriteTrapFaultFn *fault, void *opaque,
                                       Error **errp)
{
    /* The kernel's own faults fail in any case; so it needs no privilege */
    UffdTrap *trap = uffd_trap_new(&write_trap_uffd_signal, UFFD_FEATURE_SIGBUS,
                                   UFFD_USER_MODE_ONLY, errp);

    if (!trap) {
        return NULL;
    }
    trap->handler.signal = SIGBUS;
    trap->handler.start = start;
    trap->handler.size = size;
    trap->handler.fn = fault;
    trap->handler.opaque = opaque;
    if (!memory_fault_handler_add(&trap->handler, errp)) {
        uffd_trap_free(trap);
        return NULL;
    }
    return &trap->common;
}

static void uffd_signal_trap_free(WriteTrap *common)
{
    UffdTrap *trap = container_of(common, UffdTrap, common);

    memory_fault_handler_remove(&trap->handler);
    uffd_trap_free(trap);
}

const WriteTrapOps write_trap_uffd_signal = {
    .name = "uffd-signal",
    .in_thread = true,
    .raises_sigbus = true,
    .new = uffd_signal_trap_new,
    .add = uffd_trap_add,
    .arm = uffd_trap_arm,
    .release = uffd_trap_release,
    .free = uffd_signal_trap_free,
};

/* Delivery by message */

static void *uffd_thread_trap_thread(void *opaque)
{
    UffdTrap *trap = opaque;
    struct uffd_msg messages[MAX_MESSAGES];
    struct pollfd fds[] = {
        { .fd = event_notifier_get_fd(&trap->quit), .events = POLLIN },
        { .fd = trap->fd, .events = POLLIN },
    };

    for (;;) {
        int i, n;

        if (RETRY_ON_EINTR(poll(fds, ARRAY_SIZE(fds), -1)) < 0 ||
            fds[0].revents) {
            break;
        }
        n = uffd_read_events(trap->fd, messages, MAX_MESSAGES);
        for (i = 0; i < n; i++) {
            if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
                uintptr_t host = messages[i].arg.pagefault.address;

                trap->fault((void *)host, trap->opaque);
            }
        }
    }
    return NULL;
}

static WriteTrap *uffd_thread_trap_new(void *start, size_t size,
                                       WriteTrapFaultFn *fault, void *opaque,
                                       Error **errp)
{
    UffdTrap *trap = uffd_trap_new(&write_trap_uffd_thread, 0, 0, errp);
    int i, ret;

    if (!trap) {
        return NULL;
    }
    trap->fault = fault;
    trap->opaque = opaque;
    ret = event_notifier_init(&trap->quit, false);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot create an event notifier");
        uffd_trap_free(trap);
        return NULL;
    }
    for (i = 0; i < NUM_THREADS; i++) {
        g_autofree char *name = g_strdup_printf("mig/uffd%d", i);

        qemu_thread_create(&trap->threads[i], name, uffd_thread_trap_thread,
                           trap, QEMU_THREAD_JOINABLE);
    }
    return &trap->common;
}

static void uffd_thread_trap_free(WriteTrap *common)
{
    UffdTrap *trap = container_of(common, UffdTrap, common);
    int i;

    event_notifier_set(&trap->quit);
    for (i = 0; i < NUM_THREADS; i++) {
        qemu_thread_join(&trap->threads[i]);
    }
    event_notifier_cleanup(&trap->quit);
    uffd_trap_free(trap);
}

const WriteTrapOps write_trap_uffd_thread = {
    .name = "uffd-thread",
    .new = uffd_thread_trap_new,
    .add = uffd_trap_add,
    .arm = uffd_trap_arm,
    .release = uffd_trap_release,
    .free = uffd_thread_trap_free,
};

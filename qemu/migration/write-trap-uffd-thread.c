/*
 * Write trap made of userfaultfd and messages to threads of its own
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <poll.h>
#include "qapi/error.h"
#include "qemu/event_notifier.h"
#include "qemu/module.h"
#include "qemu/thread.h"
#include "qemu/userfaultfd.h"
#include "write-trap-uffd.h"

/*
 * Threads that read messages.  One that waits, for room in the owner's buffer
 * or for a page that another copies, leaves the rest to the others.
 */
#define NUM_THREADS 2

/* Messages that a thread reads at a time; it should leave some to the others */
#define MAX_MESSAGES 4

typedef struct UffdThreadTrap {
    UffdTrap uffd;
    WriteTrapFaultFn *fault;
    void *opaque;
    EventNotifier quit;
    QemuThread threads[NUM_THREADS];
} UffdThreadTrap;

static const WriteTrapOps uffd_thread_trap_ops;

static void *uffd_thread_trap_thread(void *opaque)
{
    UffdThreadTrap *trap = opaque;
    struct uffd_msg messages[MAX_MESSAGES];
    struct pollfd fds[] = {
        { .fd = event_notifier_get_fd(&trap->quit), .events = POLLIN },
        { .fd = trap->uffd.fd, .events = POLLIN },
    };

    for (;;) {
        int i, n;

        if (RETRY_ON_EINTR(poll(fds, ARRAY_SIZE(fds), -1)) < 0 ||
            fds[0].revents) {
            break;
        }
        n = uffd_read_events(trap->uffd.fd, messages, MAX_MESSAGES);
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
    UffdThreadTrap *trap = g_new0(UffdThreadTrap, 1);
    int i, ret;

    if (!uffd_trap_init(&trap->uffd, &uffd_thread_trap_ops, 0, 0, errp)) {
        g_free(trap);
        return NULL;
    }
    trap->fault = fault;
    trap->opaque = opaque;
    ret = event_notifier_init(&trap->quit, false);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot create an event notifier");
        uffd_trap_cleanup(&trap->uffd);
        g_free(trap);
        return NULL;
    }
    for (i = 0; i < NUM_THREADS; i++) {
        g_autofree char *name = g_strdup_printf("mig/uffd%d", i);

        qemu_thread_create(&trap->threads[i], name, uffd_thread_trap_thread,
                           trap, QEMU_THREAD_JOINABLE);
    }
    return &trap->uffd.common;
}

static void uffd_thread_trap_free(WriteTrap *common)
{
    UffdThreadTrap *trap = container_of(common, UffdThreadTrap, uffd.common);
    int i;

    event_notifier_set(&trap->quit);
    for (i = 0; i < NUM_THREADS; i++) {
        qemu_thread_join(&trap->threads[i]);
    }
    event_notifier_cleanup(&trap->quit);
    uffd_trap_cleanup(&trap->uffd);
    g_free(trap);
}

static const WriteTrapOps uffd_thread_trap_ops = {
    .name = "uffd-thread",
    .new = uffd_thread_trap_new,
    .add = uffd_trap_add,
    .arm = uffd_trap_arm,
    .release = uffd_trap_release,
    .free = uffd_thread_trap_free,
};

static void uffd_thread_trap_register(void)
{
    write_trap_register(&uffd_thread_trap_ops);
}

migration_init(uffd_thread_trap_register)

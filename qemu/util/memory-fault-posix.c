/*
 * Handlers for faults on ranges of host memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/lockable.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"

static struct {
    /* Serializes changes */
    QemuMutex lock;
    bool installed;
    struct sigaction old_action;

    /* Read by signal handlers without a lock */
    MemoryFaultHandler *handlers;
    /* Number of threads that may be looking at @handlers */
    int readers;
    /* Counts removals */
    unsigned int generation;
} memory_fault;

/* The generation in which this thread last tried an unclaimed fault again */
static __thread unsigned int retried_generation;

static void __attribute__((constructor)) memory_fault_init(void)
{
    qemu_mutex_init(&memory_fault.lock);
}

static bool memory_fault_dispatch(void *host)
{
    MemoryFaultHandler *h;
    bool handled = false;

    /* Full barrier, pairs with memory_fault_handler_remove() */
    qatomic_inc(&memory_fault.readers);
    for (h = qatomic_load_acquire(&memory_fault.handlers); h && !handled;
         h = qatomic_read(&h->next)) {
        if ((uintptr_t)host - (uintptr_t)h->start < h->size) {
            handled = h->fn(host, h->opaque);
        }
    }
    qatomic_dec(&memory_fault.readers);
    return handled;
}

/*
 * The range's handler may have been removed, and its accesses allowed, after
 * the fault and before the signal arrived here.  A thread can have but one
 * such fault for each removal, so one more try is enough to tell.
 */
static bool memory_fault_may_be_stale(void)
{
    unsigned int generation = qatomic_read(&memory_fault.generation);

    if (retried_generation == generation) {
        return false;
    }
    retried_generation = generation;
    return true;
}

/* Do as if our handler had never been there */
static void memory_fault_chain(int sig, siginfo_t *info, void *context)
{
    struct sigaction *old = &memory_fault.old_action;

    if (old->sa_flags & SA_SIGINFO) {
        old->sa_sigaction(sig, info, context);
    } else if (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN) {
        old->sa_handler(sig);
    } else if (info->si_code > 0) {
        /* The access is repeated on return, and kills with the right core */
        sigaction(sig, old, NULL);
    } else if (old->sa_handler == SIG_DFL) {
        /* Sent by a process, so it would not be repeated */
        sigaction(sig, old, NULL);
        raise(sig);
    }
}

static void memory_fault_signal(int sig, siginfo_t *info, void *context)
{
    int saved_errno = errno;

    if (info->si_code <= 0 ||
        !(memory_fault_dispatch(info->si_addr) ||
          memory_fault_may_be_stale())) {
        memory_fault_chain(sig, info, context);
    }
    errno = saved_errno;
}

bool memory_fault_handler_add(MemoryFaultHandler *h, Error **errp)
{
    QEMU_LOCK_GUARD(&memory_fault.lock);

    if (!memory_fault.installed) {
        struct sigaction action = {
            .sa_sigaction = memory_fault_signal,
            .sa_flags = SA_SIGINFO | SA_ONSTACK,
        };

        if (sigaction(SIGSEGV, &action, &memory_fault.old_action) < 0) {
            error_setg_errno(errp, errno, "Cannot handle SIGSEGV");
            return false;
        }
        memory_fault.installed = true;
    }

    h->next = memory_fault.handlers;
    /* The handler's fields must be seen before the handler itself */
    qatomic_store_release(&memory_fault.handlers, h);
    return true;
}

void memory_fault_handler_remove(MemoryFaultHandler *h)
{
    QEMU_LOCK_GUARD(&memory_fault.lock);
    MemoryFaultHandler **p = &memory_fault.handlers;

    while (*p != h) {
        p = &(*p)->next;
    }

    /* Whoever misses @h in the list must see that the generation is new */
    qatomic_set(&memory_fault.generation, memory_fault.generation + 1);
    qatomic_store_release(p, h->next);

    /* Unlink before looking for readers, who count before they look */
    smp_mb();
    while (qatomic_read(&memory_fault.readers)) {
        g_usleep(10);
    }
}

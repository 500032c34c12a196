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
#include "qemu/main-loop.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"

/* Memory errors that may wait for the main loop.  A host has few, if any. */
#define MAX_DEFERRED 16

static struct {
    /* Serializes changes */
    QemuMutex lock;
    bool installed[NSIG];
    struct sigaction old_action[NSIG];

    /* Read by signal handlers without a lock */
    MemoryFaultHandler *handlers;
    /* Number of threads that may be looking at @handlers */
    int readers;
    /* Counts removals */
    unsigned int generation;

    /* The main thread's, in signal context or with SIGBUS blocked */
    siginfo_t deferred[MAX_DEFERRED];
    size_t num_deferred;
    QEMUBH *deferred_bh;
} memory_fault;

/* Whether this is the main thread, with SIGBUS allowed for now */
static __thread bool sigbus_allowed;

/* The generation in which this thread last tried an unclaimed fault again */
static __thread unsigned int retried_generation;

static void __attribute__((constructor)) memory_fault_init(void)
{
    qemu_mutex_init(&memory_fault.lock);
}

/* Ask the handlers of @sig, or all if that is 0 */
static bool memory_fault_dispatch(int sig, void *host)
{
    MemoryFaultHandler *h;
    bool handled = false;

    /* Full barrier, pairs with memory_fault_handler_remove() */
    qatomic_inc(&memory_fault.readers);
    for (h = qatomic_load_acquire(&memory_fault.handlers); h && !handled;
         h = qatomic_read(&h->next)) {
        if ((!sig || h->signal == sig) &&
            (uintptr_t)host - (uintptr_t)h->start < h->size) {
            handled = h->fn(host, h->opaque);
        }
    }
    qatomic_dec(&memory_fault.readers);
    return handled;
}

/*
 * The range's handler may have been removed, and its accesses allowed, after
 * the fault and before it is known here.  A thread can have but one
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

bool memory_fault_handle(void *host)
{
    return memory_fault_dispatch(0, host) || memory_fault_may_be_stale();
}

/* The kernel's signals are repeated, but for one that no access has raised */
static bool memory_fault_is_repeated(int sig, siginfo_t *info)
{
#ifdef BUS_MCEERR_AO
    if (sig == SIGBUS && info->si_code == BUS_MCEERR_AO) {
        return false;
    }
#endif
    return info->si_code > 0;
}

/* Do as if our handler had never been there */
static void memory_fault_chain(int sig, siginfo_t *info, void *context)
{
    struct sigaction *old = &memory_fault.old_action[sig];

    if (old->sa_flags & SA_SIGINFO) {
        old->sa_sigaction(sig, info, context);
    } else if (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN) {
        old->sa_handler(sig);
    } else if (memory_fault_is_repeated(sig, info)) {
        /* The access is repeated on return, and kills with the right core */
        sigaction(sig, old, NULL);
    } else if (old->sa_handler == SIG_DFL) {
        sigaction(sig, old, NULL);
        raise(sig);
    }
}

static bool memory_fault_is_memory_error(int sig, siginfo_t *info)
{
#ifdef BUS_MCEERR_AO
    return sig == SIGBUS && (info->si_code == BUS_MCEERR_AO ||
                             info->si_code == BUS_MCEERR_AR);
#else
    return false;
#endif
}

/*
 * A memory error that can wait interrupts the main thread anywhere, but its
 * handler expects to be called by the main loop.
 */
static bool memory_fault_defer(siginfo_t *info)
{
#ifdef BUS_MCEERR_AO
    if (info->si_code == BUS_MCEERR_AO && sigbus_allowed) {
        if (memory_fault.num_deferred < MAX_DEFERRED) {
            memory_fault.deferred[memory_fault.num_deferred++] = *info;
            qemu_bh_schedule(memory_fault.deferred_bh);
        }
        return true;
    }
#endif
    return false;
}

static void memory_fault_block_sigbus(int how)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(how, &set, NULL);
}

static void memory_fault_deferred_bh(void *opaque)
{
    siginfo_t deferred[MAX_DEFERRED];
    size_t i, n;

    memory_fault_block_sigbus(SIG_BLOCK);
    n = memory_fault.num_deferred;
    memcpy(deferred, memory_fault.deferred, n * sizeof(deferred[0]));
    memory_fault.num_deferred = 0;
    if (sigbus_allowed) {
        memory_fault_block_sigbus(SIG_UNBLOCK);
    }

    for (i = 0; i < n; i++) {
        memory_fault_chain(SIGBUS, &deferred[i], NULL);
    }
}

static void memory_fault_signal(int sig, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    bool handled;

    if (memory_fault_is_memory_error(sig, info)) {
        handled = memory_fault_defer(info);
    } else {
        handled = info->si_code > 0 &&
                  (memory_fault_dispatch(sig, info->si_addr) ||
                   memory_fault_may_be_stale());
    }
    if (!handled) {
        memory_fault_chain(sig, info, context);
    }
    errno = saved_errno;
}

void memory_fault_allow_sigbus(bool allow)
{
    if (!memory_fault.deferred_bh) {
        memory_fault.deferred_bh = qemu_bh_new(memory_fault_deferred_bh, NULL);
    }
    /* A memory error that comes in between is deferred */
    if (allow) {
        sigbus_allowed = true;
        memory_fault_block_sigbus(SIG_UNBLOCK);
    } else {
        memory_fault_block_sigbus(SIG_BLOCK);
        sigbus_allowed = false;
    }
}

bool memory_fault_handler_add(MemoryFaultHandler *h, Error **errp)
{
    QEMU_LOCK_GUARD(&memory_fault.lock);

    if (!memory_fault.installed[h->signal]) {
        struct sigaction action = {
            .sa_sigaction = memory_fault_signal,
            .sa_flags = SA_SIGINFO | SA_ONSTACK,
        };

        if (sigaction(h->signal, &action,
                      &memory_fault.old_action[h->signal]) < 0) {
            error_setg_errno(errp, errno, "Cannot handle signal %d",
                             h->signal);
            return false;
        }
        memory_fault.installed[h->signal] = true;
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

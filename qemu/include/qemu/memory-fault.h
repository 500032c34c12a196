/*
 * Handlers for faults on ranges of host memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef QEMU_MEMORY_FAULT_H
#define QEMU_MEMORY_FAULT_H

/**
 * MemoryFaultFn: called in the thread whose access faulted, in signal context
 *
 * It may be called in any thread and under any lock that a thread may hold
 * while it touches the range, so it must not allocate memory nor take such a
 * lock.  It may wait, as a system call would.
 *
 * @host: the address that was accessed
 * @opaque: from the MemoryFaultHandler
 *
 * Returns: true if the access can be tried again, false if the fault is not
 * the handler's: then it goes on to whoever handled the signal before, or
 * kills the process.
 */
typedef bool MemoryFaultFn(void *host, void *opaque);

/**
 * MemoryFaultHandler: one range of addresses and who handles faults on it
 *
 * Set by the caller before memory_fault_handler_add(); must stay in place and
 * unchanged until memory_fault_handler_remove() has returned.
 */
typedef struct MemoryFaultHandler {
    int signal;                 /* SIGSEGV or SIGBUS */
    void *start;
    size_t size;                /* bytes */
    MemoryFaultFn *fn;
    void *opaque;

    /* private */
    struct MemoryFaultHandler *next;
} MemoryFaultHandler;

/**
 * memory_fault_handler_add: handle a signal on a range
 *
 * The first call for a signal installs QEMU's handler, which stays for the
 * rest of the process's life.  If ranges overlap, the handler added last is
 * asked first.  Any thread; waits for no other.
 *
 * Memory errors of the host (BUS_MCEERR_*) are never a handler's.  A thread
 * that blocks SIGBUS is killed by it, see memory_fault_allow_sigbus().
 *
 * Returns: true, or false with @errp set if the signal cannot be handled
 */
bool memory_fault_handler_add(MemoryFaultHandler *h, Error **errp);

/**
 * memory_fault_handler_remove: handle no more faults on a range
 *
 * All accesses to the range must be allowed again by now.  Waits until no
 * thread is in @h's function: wake those that wait there before.  A thread
 * whose access was denied just before, and whose signal arrives only now,
 * tries again and goes on.
 */
void memory_fault_handler_remove(MemoryFaultHandler *h);

/**
 * memory_fault_handle: handle a fault that came without a signal
 *
 * For a thread that is told in another way where its access was denied, as KVM
 * tells a vCPU's thread.  Calls the handler of the range, of whatever signal;
 * may wait as that does.  Any thread.
 *
 * Returns: true if the access can be tried again, false if nobody handles it
 */
bool memory_fault_handle(void *host);

/**
 * memory_fault_allow_sigbus: let SIGBUS reach handlers in the main thread
 *
 * The main thread blocks SIGBUS and reads it from a file descriptor, for the
 * memory errors that the host reports asynchronously (BUS_MCEERR_AO).  While
 * SIGBUS is allowed, these are passed on to the main loop, where they are
 * handled as ever.  Threads made by qemu_thread_create() never block SIGBUS.
 *
 * Main thread only.
 */
#ifdef CONFIG_POSIX
void memory_fault_allow_sigbus(bool allow);
#else
static inline void memory_fault_allow_sigbus(bool allow)
{
}
#endif

#endif

/*
 * Unit tests for memory faults that are nobody's, and for who was there before
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * The handler for SIGSEGV is installed once in a process's life, so that each
 * test is a process of its own.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/resource.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"

static size_t page_size;

static uint8_t *map_page(void)
{
    uint8_t *p = mmap(NULL, page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);

    g_assert(p != MAP_FAILED);
    return p;
}

static void protect(void *host, int prot)
{
    void *page = QEMU_ALIGN_PTR_DOWN(host, page_size);

    g_assert_cmpint(mprotect(page, page_size, prot), ==, 0);
}

static void write_byte(uint8_t *host)
{
    qatomic_set(host, 1);
}

/* A handler that allows the access, unless it is told that it is not its */
typedef struct Opener {
    MemoryFaultHandler handler;
    bool refuse;
    int calls;
} Opener;

static bool opener_fn(void *host, void *opaque)
{
    Opener *o = opaque;

    o->calls++;
    if (!o->refuse) {
        protect(host, PROT_READ | PROT_WRITE);
    }
    return !o->refuse;
}

static void opener_add(Opener *o, void *start, size_t size)
{
    o->handler.start = start;
    o->handler.size = size;
    o->handler.fn = opener_fn;
    o->handler.opaque = o;
    memory_fault_handler_add(&o->handler, &error_abort);
}

/* Returns the signal that kills a process doing @fn; 0 if it ends well */
static int killed_by(void (*fn)(void))
{
    pid_t pid = fork();
    int status;

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        const struct rlimit no_core = { 0, 0 };

        setrlimit(RLIMIT_CORE, &no_core);
        /* Should the fault be repeated for ever */
        alarm(30);
        fn();
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

/* Some handler is there, but for another range */
static void add_other_handler(void)
{
    static Opener other;

    opener_add(&other, map_page(), page_size);
    write_byte(other.handler.start);
    g_assert_cmpint(other.calls, ==, 1);
}

static void child_write(void)
{
    add_other_handler();
    write_byte(map_page());
}

static void *write_thread(void *opaque)
{
    write_byte(opaque);
    return NULL;
}

static void child_write_thread(void)
{
    QemuThread thread;

    add_other_handler();
    qemu_thread_create(&thread, "writer", write_thread,
                       map_page(), QEMU_THREAD_JOINABLE);
    qemu_thread_join(&thread);
}

static void child_write_refused(void)
{
    uint8_t *page = map_page();
    Opener o = { .refuse = true };

    opener_add(&o, page, page_size);
    write_byte(page);
}

static void child_write_removed(void)
{
    uint8_t *page = map_page();
    Opener o = { };

    opener_add(&o, page, page_size);
    write_byte(page);
    memory_fault_handler_remove(&o.handler);
    protect(page, PROT_READ);
    /* It is tried again, but not for ever */
    write_byte(page);
}

static void child_raise(void)
{
    add_other_handler();
    raise(SIGSEGV);
}

static void child_kill(void)
{
    add_other_handler();
    kill(getpid(), SIGSEGV);
}

static void child_fine(void)
{
    add_other_handler();
}

static void handle_segv(void (*handler)(int))
{
    struct sigaction action = { .sa_handler = handler };

    g_assert_cmpint(sigaction(SIGSEGV, &action, NULL), ==, 0);
}

static void test_kill(void)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    /* Sanitizers have a handler of their own, which does not kill */
    handle_segv(SIG_DFL);
    g_assert_cmpint(killed_by(child_fine), ==, 0);
    g_assert_cmpint(killed_by(child_write), ==, SIGSEGV);
    g_assert_cmpint(killed_by(child_write_thread), ==, SIGSEGV);
    g_assert_cmpint(killed_by(child_write_refused), ==, SIGSEGV);
    g_assert_cmpint(killed_by(child_write_removed), ==, SIGSEGV);
    g_assert_cmpint(killed_by(child_raise), ==, SIGSEGV);
    g_assert_cmpint(killed_by(child_kill), ==, SIGSEGV);
}

/* If it was ignored before: signals that were sent are, faults cannot be */
static void test_ignored(void)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    handle_segv(SIG_IGN);
    g_assert_cmpint(killed_by(child_raise), ==, 0);
    g_assert_cmpint(killed_by(child_kill), ==, 0);
    g_assert_cmpint(killed_by(child_write), ==, SIGSEGV);
}

static struct {
    int calls;
    int sent;
    void *host;
} previous;

static void previous_sigaction(int sig, siginfo_t *info, void *context)
{
    g_assert_cmpint(sig, ==, SIGSEGV);
    g_assert_nonnull(context);
    previous.calls++;
    if (info->si_code <= 0) {
        previous.sent++;
        return;
    }
    previous.host = info->si_addr;
    protect(info->si_addr, PROT_READ | PROT_WRITE);
}

static void previous_handler(int sig)
{
    g_assert_cmpint(sig, ==, SIGSEGV);
    previous.calls++;
    protect(previous.host, PROT_READ | PROT_WRITE);
}

static void test_chain_sigaction(void)
{
    struct sigaction action = {
        .sa_sigaction = previous_sigaction,
        .sa_flags = SA_SIGINFO,
    };
    uint8_t *page = map_page();
    Opener o = { .refuse = true };

    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    g_assert_cmpint(sigaction(SIGSEGV, &action, NULL), ==, 0);
    add_other_handler();
    g_assert_cmpint(previous.calls, ==, 0);

    write_byte(page + 42);
    g_assert_cmpint(previous.calls, ==, 1);
    g_assert_true(previous.host == page + 42);

    protect(page, PROT_READ);
    opener_add(&o, NULL, SIZE_MAX);
    write_byte(page);
    g_assert_cmpint(o.calls, ==, 1);
    g_assert_cmpint(previous.calls, ==, 2);

    /* A signal that was sent is no fault, whatever its address looks like */
    raise(SIGSEGV);
    kill(getpid(), SIGSEGV);
    g_assert_cmpint(previous.sent, ==, 2);
    g_assert_cmpint(o.calls, ==, 1);
}

static void test_chain_handler(void)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    handle_segv(previous_handler);
    add_other_handler();
    previous.host = map_page();
    write_byte(previous.host);
    g_assert_cmpint(previous.calls, ==, 1);
}

int main(int argc, char **argv)
{
    page_size = qemu_real_host_page_size();

    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/memory-fault/kill", test_kill);
    g_test_add_func("/memory-fault/ignored", test_ignored);
    g_test_add_func("/memory-fault/chain/sigaction", test_chain_sigaction);
    g_test_add_func("/memory-fault/chain/handler", test_chain_handler);
    return g_test_run();
}

/*
 * Unit tests for handlers for faults on ranges of host memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"

static size_t page_size;

static uint8_t *map_pages(size_t n, int prot)
{
    uint8_t *p = mmap(NULL, n * page_size, prot, MAP_PRIVATE | MAP_ANONYMOUS,
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
    void *host;
    pthread_t thread;
} Opener;

static bool opener_fn(void *host, void *opaque)
{
    Opener *o = opaque;

    o->host = host;
    o->thread = pthread_self();
    qatomic_inc(&o->calls);
    if (o->refuse) {
        return false;
    }
    protect(host, PROT_READ | PROT_WRITE);
    /* Interrupted code must not see this */
    errno = ENOTTY;
    return true;
}

static void opener_add(Opener *o, void *start, size_t size)
{
    o->handler.signal = SIGSEGV;
    o->handler.start = start;
    o->handler.size = size;
    o->handler.fn = opener_fn;
    o->handler.opaque = o;
    memory_fault_handler_add(&o->handler, &error_abort);
}

static void test_range(void)
{
    uint8_t *p = map_pages(3, PROT_READ);
    uint8_t *inner_start = p + page_size;
    uint8_t *inner_end = p + 2 * page_size;
    Opener outer = { }, inner = { };

    opener_add(&outer, p, 3 * page_size);
    opener_add(&inner, inner_start, page_size);

    /* The one that was added last is asked first, for its range only */
    errno = ERANGE;
    write_byte(inner_start);
    g_assert_cmpint(errno, ==, ERANGE);
    g_assert_cmpint(inner.calls, ==, 1);
    g_assert_true(inner.host == inner_start);
    g_assert_true(pthread_equal(inner.thread, pthread_self()));
    protect(inner_start, PROT_READ);
    write_byte(inner_end - 1);
    g_assert_cmpint(inner.calls, ==, 2);
    g_assert_true(inner.host == inner_end - 1);
    g_assert_cmpint(outer.calls, ==, 0);

    write_byte(inner_start - 1);
    write_byte(inner_end);
    g_assert_cmpint(inner.calls, ==, 2);
    g_assert_cmpint(outer.calls, ==, 2);

    /* If it is not the first one's, the next one is asked */
    protect(inner_start, PROT_READ);
    inner.refuse = true;
    write_byte(inner_start);
    g_assert_cmpint(inner.calls, ==, 3);
    g_assert_cmpint(outer.calls, ==, 3);

    /* Reads are faults as well, if they are denied */
    protect(inner_start, PROT_NONE);
    g_assert_cmpint(qatomic_read(inner_start), ==, 1);
    g_assert_cmpint(outer.calls, ==, 4);

    /* Not in the order in which they were added */
    memory_fault_handler_remove(&outer.handler);
    protect(inner_start, PROT_READ);
    inner.refuse = false;
    write_byte(inner_start);
    g_assert_cmpint(inner.calls, ==, 5);
    g_assert_cmpint(outer.calls, ==, 4);
    memory_fault_handler_remove(&inner.handler);
    munmap(p, 3 * page_size);
}

#define NUM_THREADS 6

typedef struct Writer {
    uint8_t *page;
    QemuThread thread;
    pthread_t in_handler;
    bool own_thread;
} Writer;

static Writer writers[NUM_THREADS];
static int writers_in_handler;

/* Lets nobody go before all are there */
static bool meeting_fn(void *host, void *opaque)
{
    uint8_t *pages = opaque;

    writers[((uint8_t *)host - pages) / page_size].in_handler = pthread_self();
    qatomic_inc(&writers_in_handler);
    while (qatomic_read(&writers_in_handler) < NUM_THREADS) {
        g_usleep(10);
    }
    protect(host, PROT_READ | PROT_WRITE);
    return true;
}

static void *writer_thread(void *opaque)
{
    Writer *w = opaque;

    write_byte(w->page);
    w->own_thread = pthread_equal(w->in_handler, pthread_self());
    return NULL;
}

static void test_threads(void)
{
    uint8_t *p = map_pages(NUM_THREADS, PROT_READ);
    MemoryFaultHandler handler = {
        .signal = SIGSEGV,
        .start = p,
        .size = NUM_THREADS * page_size,
        .fn = meeting_fn,
        .opaque = p,
    };
    GThread *foreign;
    int i;

    memory_fault_handler_add(&handler, &error_abort);
    for (i = 0; i < NUM_THREADS; i++) {
        writers[i].page = p + i * page_size;
    }
    for (i = 1; i < NUM_THREADS; i++) {
        qemu_thread_create(&writers[i].thread, "writer", writer_thread,
                           &writers[i], QEMU_THREAD_JOINABLE);
    }
    /* Libraries have their own threads, with no signal blocked */
    foreign = g_thread_new("foreign", writer_thread, &writers[0]);

    g_thread_join(foreign);
    for (i = 1; i < NUM_THREADS; i++) {
        qemu_thread_join(&writers[i].thread);
    }
    for (i = 0; i < NUM_THREADS; i++) {
        g_assert_true(writers[i].own_thread);
        g_assert_cmpint(*writers[i].page, ==, 1);
    }
    g_assert_cmpint(writers_in_handler, ==, NUM_THREADS);
    memory_fault_handler_remove(&handler);
    munmap(p, NUM_THREADS * page_size);
}

static struct {
    bool entered;
    bool leave;
    bool removed;
} gate;

static bool gate_fn(void *host, void *opaque)
{
    protect(host, PROT_READ | PROT_WRITE);
    qatomic_set(&gate.entered, true);
    while (!qatomic_read(&gate.leave)) {
        g_usleep(10);
    }
    /* The owner may free all it has as soon as it is removed */
    g_assert_false(qatomic_read(&gate.removed));
    return true;
}

static void *remove_thread(void *opaque)
{
    memory_fault_handler_remove(opaque);
    qatomic_set(&gate.removed, true);
    return NULL;
}

static void test_remove_waits(void)
{
    Writer w = { .page = map_pages(1, PROT_READ) };
    MemoryFaultHandler handler = {
        .signal = SIGSEGV,
        .start = w.page,
        .size = page_size,
        .fn = gate_fn,
    };
    QemuThread remover;

    memory_fault_handler_add(&handler, &error_abort);
    qemu_thread_create(&w.thread, "writer", writer_thread, &w,
                       QEMU_THREAD_JOINABLE);
    while (!qatomic_read(&gate.entered)) {
        g_usleep(10);
    }
    qemu_thread_create(&remover, "remover", remove_thread, &handler,
                       QEMU_THREAD_JOINABLE);
    g_usleep(50 * 1000);
    g_assert_false(qatomic_read(&gate.removed));

    qatomic_set(&gate.leave, true);
    qemu_thread_join(&remover);
    qemu_thread_join(&w.thread);
    munmap(w.page, page_size);
}

static struct {
    struct sigaction next;
    bool entered;
    bool leave;
} delay;

/* Holds a signal back on its way to the handler */
static void delay_signal(int sig, siginfo_t *info, void *context)
{
    qatomic_set(&delay.entered, true);
    while (!qatomic_read(&delay.leave)) {
        g_usleep(10);
    }
    delay.next.sa_sigaction(sig, info, context);
}

static void test_remove_stale(void)
{
    struct sigaction action = {
        .sa_sigaction = delay_signal,
        .sa_flags = SA_SIGINFO,
    };
    struct sigaction now;
    Writer w = { .page = map_pages(1, PROT_READ) };
    Opener o = { };
    int i;

    /* Each thread may have one such fault for each removal */
    for (i = 0; i < 3; i++) {
        opener_add(&o, w.page, page_size);
        protect(w.page, PROT_READ);
        qatomic_set(&delay.entered, false);
        qatomic_set(&delay.leave, false);
        g_assert_cmpint(sigaction(SIGSEGV, &action, &delay.next), ==, 0);

        qemu_thread_create(&w.thread, "writer", writer_thread, &w,
                           QEMU_THREAD_JOINABLE);
        while (!qatomic_read(&delay.entered)) {
            g_usleep(10);
        }
        protect(w.page, PROT_READ | PROT_WRITE);
        memory_fault_handler_remove(&o.handler);
        qatomic_set(&delay.leave, true);
        qemu_thread_join(&w.thread);

        g_assert_cmpint(o.calls, ==, 0);
        /* It has not gone on to the default action, which would stay */
        g_assert_cmpint(sigaction(SIGSEGV, &delay.next, &now), ==, 0);
        g_assert_true(now.sa_sigaction == delay_signal);
    }
    munmap(w.page, page_size);
}

static bool hammering;

static void *hammer_thread(void *opaque)
{
    while (qatomic_read(&hammering)) {
        write_byte(opaque);
    }
    return NULL;
}

static void test_remove_race(void)
{
    uint8_t *page = map_pages(1, PROT_READ | PROT_WRITE);
    struct sigaction before, after;
    QemuThread threads[3];
    Opener o = { };
    int i;

    sigaction(SIGSEGV, NULL, &before);

    qatomic_set(&hammering, true);
    for (i = 0; i < ARRAY_SIZE(threads); i++) {
        qemu_thread_create(&threads[i], "hammer", hammer_thread, page,
                           QEMU_THREAD_JOINABLE);
    }
    for (i = 0; i < 10000 || !o.calls; i++) {
        opener_add(&o, page, page_size);
        protect(page, PROT_READ);
        if (i % 4 == 0) {
            g_usleep(1);
        }
        protect(page, PROT_READ | PROT_WRITE);
        memory_fault_handler_remove(&o.handler);
    }
    qatomic_set(&hammering, false);
    for (i = 0; i < ARRAY_SIZE(threads); i++) {
        qemu_thread_join(&threads[i]);
    }
    g_test_message("%d faults were handled", o.calls);
    sigaction(SIGSEGV, NULL, &after);
    g_assert_true(before.sa_sigaction == after.sa_sigaction);
    munmap(page, page_size);
}

/* A fault that KVM tells of, say */
static void test_without_signal(void)
{
    static const int signals[] = { SIGSEGV, SIGBUS };
    uint8_t *p = map_pages(2, PROT_READ);
    size_t i;

    for (i = 0; i < ARRAY_SIZE(signals); i++) {
        Opener o = { };

        opener_add(&o, p, page_size);
        o.handler.signal = signals[i];
        protect(p, PROT_READ);
        g_assert_true(memory_fault_handle(p + 1));
        g_assert_cmpint(o.calls, ==, 1);
        g_assert_true(o.host == p + 1);
        g_assert_true(pthread_equal(o.thread, pthread_self()));
        write_byte(p);
        g_assert_cmpint(o.calls, ==, 1);

        /* Now there can be no fault that came before a handler's removal */
        memory_fault_handle(p + page_size);
        g_assert_false(memory_fault_handle(p + page_size));
        o.refuse = true;
        g_assert_false(memory_fault_handle(p));
        g_assert_cmpint(o.calls, ==, 2);

        memory_fault_handler_remove(&o.handler);
        g_assert_true(memory_fault_handle(p));
        g_assert_false(memory_fault_handle(p));
        g_assert_cmpint(o.calls, ==, 2);
    }
    munmap(p, 2 * page_size);
}

int main(int argc, char **argv)
{
    page_size = qemu_real_host_page_size();

    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/memory-fault/range", test_range);
    g_test_add_func("/memory-fault/threads", test_threads);
    g_test_add_func("/memory-fault/remove/waits", test_remove_waits);
    g_test_add_func("/memory-fault/remove/stale", test_remove_stale);
    g_test_add_func("/memory-fault/remove/race", test_remove_race);
    g_test_add_func("/memory-fault/without-signal", test_without_signal);
    return g_test_run();
}

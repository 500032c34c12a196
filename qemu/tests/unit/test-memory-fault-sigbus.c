/*
 * Unit tests for memory faults that come as SIGBUS
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * As in QEMU: the main loop blocks SIGBUS in the main thread, and somebody
 * handled it before.
 */
#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/main-loop.h"
#include "qemu/memory-fault.h"
#include "qemu/thread.h"
#include "qemu/userfaultfd.h"
#include "memory-fault-helpers.h"

/* Who handled SIGBUS before */
static int previous_calls;

static void previous_sigaction(int sig, siginfo_t *info, void *context)
{
    previous_calls++;
    fault_allow(info->si_addr);
}

/* Handlers of one signal do not see the other's faults */
static void test_apart(void)
{
    size_t size = fault_page_size();
    uint8_t *p = fault_map(SIGSEGV, 2);
    Opener segv = { }, bus = { };

    memory_fault_allow_sigbus(true);
    opener_add(&segv, SIGSEGV, p, 2 * size);
    opener_add(&bus, SIGBUS, p, 2 * size);
    fault_deny(SIGBUS, p);

    write_byte(p + 5);
    g_assert_cmpint(bus.calls, ==, 1);
    g_assert_true(bus.host == p + 5);
    g_assert_cmpint(segv.calls, ==, 0);

    write_byte(p + size + 7);
    g_assert_cmpint(segv.calls, ==, 1);
    g_assert_true(segv.host == p + size + 7);
    g_assert_cmpint(bus.calls, ==, 1);

    /* Nor when they are the only one there */
    memory_fault_handler_remove(&bus.handler);
    fault_deny(SIGSEGV, p);
    write_byte(p);
    g_assert_cmpint(segv.calls, ==, 2);
    memory_fault_handler_remove(&segv.handler);
    opener_add(&bus, SIGBUS, p, 2 * size);
    fault_deny(SIGBUS, p);
    write_byte(p);
    g_assert_cmpint(bus.calls, ==, 2);
    g_assert_cmpint(previous_calls, ==, 0);

    memory_fault_handler_remove(&bus.handler);
    memory_fault_allow_sigbus(false);
    munmap(p, 2 * size);
}

typedef struct File {
    int fd;
    int calls;
} File;

static bool lengthen_fn(void *host, void *opaque)
{
    File *f = opaque;

    f->calls++;
    return ftruncate(f->fd, 2 * fault_page_size()) == 0;
}

static void *write_thread(void *opaque)
{
    write_byte(opaque);
    return NULL;
}

static void test_truncated(void)
{
    size_t size = fault_page_size();
    File f = { .fd = memfd_create("truncated", 0) };
    MemoryFaultHandler handler = {
        .signal = SIGBUS,
        .size = 2 * size,
        .fn = lengthen_fn,
        .opaque = &f,
    };
    uint8_t byte, *p;

    g_assert_cmpint(ftruncate(f.fd, 2 * size), ==, 0);
    p = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_SHARED, f.fd, 0);
    g_assert(p != MAP_FAILED);
    handler.start = p;
    memory_fault_handler_add(&handler, &error_abort);

    write_byte(p + size);
    g_assert_cmpint(f.calls, ==, 0);
    g_assert_cmpint(ftruncate(f.fd, size), ==, 0);
    in_thread(write_thread, p + size + 1);
    g_assert_cmpint(f.calls, ==, 1);
    g_assert_cmpint(pread(f.fd, &byte, 1, size + 1), ==, 1);
    g_assert_cmpint(byte, ==, 1);

    memory_fault_handler_remove(&handler);
    munmap(p, 2 * size);
    close(f.fd);
}

static bool zero_page_fn(void *host, void *opaque)
{
    File *f = opaque;
    size_t size = fault_page_size();

    f->calls++;
    return uffd_zero_page(f->fd, QEMU_ALIGN_PTR_DOWN(host, size), size,
                          false) == 0;
}

static void test_userfaultfd(void)
{
    size_t size = fault_page_size();
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_SIGBUS,
    };
    File f = { .fd = uffd_open(O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    MemoryFaultHandler handler = {
        .signal = SIGBUS,
        .size = 3 * size,
        .fn = zero_page_fn,
        .opaque = &f,
    };
    uint8_t *p;

    if (f.fd < 0) {
        g_autofree char *why = g_strdup_printf("userfaultfd: %s",
                                               strerror(errno));

        g_test_skip(why);
        return;
    }
    g_assert_cmpint(ioctl(f.fd, UFFDIO_API, &api), ==, 0);
    p = mmap(NULL, 3 * size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_assert(p != MAP_FAILED);
    g_assert_cmpint(uffd_register_memory(f.fd, p, 3 * size,
                                         UFFDIO_REGISTER_MODE_MISSING, NULL),
                    ==, 0);
    handler.start = p;
    memory_fault_handler_add(&handler, &error_abort);

    in_thread(write_thread, p + size);
    g_assert_cmpint(f.calls, ==, 1);
    g_assert_cmpint(p[size], ==, 1);
    memory_fault_allow_sigbus(true);
    g_assert_cmpint(p[2 * size], ==, 0);
    g_assert_cmpint(f.calls, ==, 2);
    write_byte(p + 2 * size);
    g_assert_cmpint(f.calls, ==, 2);
    memory_fault_allow_sigbus(false);

    memory_fault_handler_remove(&handler);
    close(f.fd);
    munmap(p, 3 * size);
}

static void *check_mask_thread(void *opaque)
{
    g_assert_false(sigbus_blocked());
    return NULL;
}

/* Where it is not blocked */
static void test_threads(void)
{
    size_t size = fault_page_size();
    uint8_t *p = fault_map(SIGBUS, 2);
    Opener o = { };

    opener_add(&o, SIGBUS, p, size);
    g_assert_true(sigbus_blocked());
    in_thread(check_mask_thread, NULL);
    in_thread(write_thread, p + 3);
    g_assert_cmpint(o.calls, ==, 1);
    g_assert_true(o.host == p + 3);
    g_assert_false(pthread_equal(o.thread, pthread_self()));

    /* To be allowed here makes no difference there */
    memory_fault_allow_sigbus(true);
    in_thread(check_mask_thread, NULL);
    memory_fault_allow_sigbus(false);

    /* What is nobody's goes on to who was there before */
    in_thread(write_thread, p + size);
    g_assert_cmpint(previous_calls, ==, 1);
    g_assert_cmpint(o.calls, ==, 1);
    previous_calls = 0;

    memory_fault_handler_remove(&o.handler);
    munmap(p, 2 * size);
}

static uint8_t *main_page;

static void child_write(void)
{
    write_byte(main_page);
}

static void test_main_thread(void)
{
    Opener o = { };
    int i;

    main_page = fault_map(SIGBUS, 1);
    opener_add(&o, SIGBUS, main_page, fault_page_size());

    for (i = 1; i <= 2; i++) {
        memory_fault_allow_sigbus(true);
        g_assert_false(sigbus_blocked());
        write_byte(main_page);
        g_assert_cmpint(o.calls, ==, i);
        g_assert_true(pthread_equal(o.thread, pthread_self()));

        fault_deny(SIGBUS, main_page);
        g_assert_cmpint(killed_by(child_write), ==, 0);
        memory_fault_allow_sigbus(false);
        g_assert_true(sigbus_blocked());
        g_assert_cmpint(killed_by(child_write), ==, SIGBUS);
    }

    memory_fault_handler_remove(&o.handler);
    munmap(main_page, fault_page_size());
}

/* Preallocation, which has a handler for its time, waits in another one */
static struct {
    bool entered;
    bool leave;
} prealloc;

static bool prealloc_fn(void *host, void *opaque)
{
    qatomic_set(&prealloc.entered, true);
    while (!qatomic_read(&prealloc.leave)) {
        g_usleep(100);
    }
    fault_allow(host);
    return true;
}

static void *meanwhile_thread(void *opaque)
{
    while (!qatomic_read(&prealloc.entered)) {
        g_usleep(100);
    }
    write_byte(opaque);
    qatomic_set(&prealloc.leave, true);
    return NULL;
}

static void test_prealloc(void)
{
    size_t size = fault_page_size();
    /* It has no right to write, so the kernel does not populate it at once */
    uint8_t *area = fault_map(SIGSEGV, 3);
    uint8_t *page = fault_map(SIGBUS, 1);
    MemoryFaultHandler handler = {
        .signal = SIGSEGV,
        .start = area,
        .size = size,
        .fn = prealloc_fn,
    };
    struct sigaction before, after;
    Error *err = NULL;
    QemuThread thread;
    Opener o = { };

    memory_fault_handler_add(&handler, &error_abort);
    opener_add(&o, SIGBUS, NULL, SIZE_MAX);
    fault_allow(area + size);
    fault_allow(area + 2 * size);
    sigaction(SIGBUS, NULL, &before);

    /* Somebody else's fault is forwarded to us */
    qemu_thread_create(&thread, "meanwhile", meanwhile_thread, page + 42,
                       QEMU_THREAD_JOINABLE);
    g_assert_true(qemu_prealloc_mem(-1, (char *)area, 3 * size, 1, NULL, false,
                                    &error_abort));
    qemu_thread_join(&thread);
    g_assert_cmpint(o.calls, ==, 1);
    g_assert_true(o.host == page + 42);

    /* A fault of its own makes it fail, and is not ours */
    fault_deny(SIGSEGV, area);
    fault_deny(SIGBUS, area + 2 * size);
    g_assert_false(qemu_prealloc_mem(-1, (char *)area, 3 * size, 1, NULL,
                                     false, &err));
    error_free_or_abort(&err);
    g_assert_cmpint(o.calls, ==, 1);

    sigaction(SIGBUS, NULL, &after);
    g_assert_true(before.sa_sigaction == after.sa_sigaction);
    g_assert_cmpint(before.sa_flags, ==, after.sa_flags);
    in_thread(write_thread, area + 2 * size);
    g_assert_cmpint(o.calls, ==, 2);

    memory_fault_handler_remove(&o.handler);
    memory_fault_handler_remove(&handler);
    munmap(area, 3 * size);
    munmap(page, size);
}

int main(int argc, char **argv)
{
    struct sigaction action = {
        .sa_sigaction = previous_sigaction,
        .sa_flags = SA_SIGINFO,
    };

    g_test_init(&argc, &argv, NULL);
    g_assert_cmpint(sigaction(SIGBUS, &action, NULL), ==, 0);
    qemu_init_main_loop(&error_abort);
    g_test_add_func("/memory-fault/sigbus/apart", test_apart);
    g_test_add_func("/memory-fault/sigbus/truncated", test_truncated);
    g_test_add_func("/memory-fault/sigbus/userfaultfd", test_userfaultfd);
    g_test_add_func("/memory-fault/sigbus/threads", test_threads);
    g_test_add_func("/memory-fault/sigbus/main-thread", test_main_thread);
    g_test_add_func("/memory-fault/sigbus/prealloc", test_prealloc);
    return g_test_run();
}

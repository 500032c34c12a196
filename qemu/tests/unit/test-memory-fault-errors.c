/*
 * Unit tests for memory errors of the host, which come as SIGBUS too
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * As in QEMU: the main loop blocks SIGBUS in the main thread, and somebody
 * handled it before, who is to be told of memory errors and of nothing else.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/memory-fault.h"
#include "memory-fault-helpers.h"

/* More than are kept for the main loop */
#define MAX_ERRORS 32

/* What who handled SIGBUS before was told, and in which thread */
static struct {
    int num_errors;
    siginfo_t errors[MAX_ERRORS];
    pthread_t thread;
} previous;

static void previous_sigaction(int sig, siginfo_t *info, void *context)
{
    g_assert_cmpint(previous.num_errors, <, MAX_ERRORS);
    previous.errors[previous.num_errors++] = *info;
    previous.thread = pthread_self();
}

/* As often as a deferred or pending signal may take */
static void run_main_loop(void)
{
    int i;

    for (i = 0; i < 10; i++) {
        main_loop_wait(true);
    }
}

/* Assert what the previous handler was told, and forget it */
static void assert_errors(int num, int code, uint8_t *first)
{
    int i;

    g_assert_cmpint(previous.num_errors, ==, num);
    for (i = 0; i < num; i++) {
        g_assert_cmpint(previous.errors[i].si_signo, ==, SIGBUS);
        g_assert_cmpint(previous.errors[i].si_code, ==, code);
        g_assert_true(previous.errors[i].si_addr == first + i);
    }
    previous.num_errors = 0;
}

static void *ar_thread(void *opaque)
{
    send_memory_error(BUS_MCEERR_AR, opaque);
    assert_errors(1, BUS_MCEERR_AR, opaque);
    g_assert_true(pthread_equal(previous.thread, pthread_self()));
    return NULL;
}

static void *ao_thread(void *opaque)
{
    send_memory_error(BUS_MCEERR_AO, opaque);
    assert_errors(1, BUS_MCEERR_AO, opaque);
    g_assert_true(pthread_equal(previous.thread, pthread_self()));
    return NULL;
}

/* An error that cannot wait, and any in a thread where none is expected */
static void test_at_once(void)
{
    uint8_t *p = fault_map(SIGBUS, 1);
    Opener o = { };

    /* Nobody's handler is asked about those */
    opener_add(&o, SIGBUS, NULL, SIZE_MAX);
    memory_fault_allow_sigbus(true);
    ar_thread(p + 1);
    in_thread(ar_thread, p + 2);
    in_thread(ao_thread, p + 3);
    run_main_loop();
    assert_errors(0, 0, NULL);
    memory_fault_allow_sigbus(false);
    in_thread(ar_thread, p + 4);

    g_assert_cmpint(o.calls, ==, 0);
    memory_fault_handler_remove(&o.handler);
    munmap(p, fault_page_size());
}

static void assert_errors_in_main_loop(int num, uint8_t *first, bool allowed)
{
    assert_errors(0, 0, NULL);
    run_main_loop();
    g_assert_true(pthread_equal(previous.thread, pthread_self()));
    assert_errors(num, BUS_MCEERR_AO, first);
    g_assert_cmpint(sigbus_blocked(), ==, !allowed);
    run_main_loop();
    assert_errors(0, 0, NULL);
}

/* An error that can wait does so, until the main loop runs, and only there */
static void test_deferred(void)
{
    uint8_t *p = fault_map(SIGBUS, 1);
    Opener o = { };
    int i;

    opener_add(&o, SIGBUS, NULL, SIZE_MAX);

    /* Blocked, so that the main loop has it from a file descriptor */
    send_memory_error(BUS_MCEERR_AO, p + 1);
    assert_errors_in_main_loop(1, p + 1, false);

    memory_fault_allow_sigbus(true);
    send_memory_error(BUS_MCEERR_AO, p + 2);
    assert_errors_in_main_loop(1, p + 2, true);

    /* Several, in their order; and again */
    for (i = 0; i < 2; i++) {
        send_memory_error(BUS_MCEERR_AO, p + 3);
        send_memory_error(BUS_MCEERR_AO, p + 4);
        send_memory_error(BUS_MCEERR_AO, p + 5);
        assert_errors_in_main_loop(3, p + 3, true);
    }

    /* More than anybody expects: the first ones are kept */
    for (i = 0; i < MAX_ERRORS; i++) {
        send_memory_error(BUS_MCEERR_AO, p + i);
    }
    assert_errors_in_main_loop(16, p, true);

    /* One that came while allowed is handled if it is not any more */
    send_memory_error(BUS_MCEERR_AO, p + 6);
    memory_fault_allow_sigbus(false);
    assert_errors_in_main_loop(1, p + 6, false);

    /* And the other way round */
    send_memory_error(BUS_MCEERR_AO, p + 7);
    memory_fault_allow_sigbus(true);
    assert_errors_in_main_loop(1, p + 7, true);
    memory_fault_allow_sigbus(false);

    g_assert_cmpint(o.calls, ==, 0);
    memory_fault_handler_remove(&o.handler);
    munmap(p, fault_page_size());
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
    g_test_add_func("/memory-fault/errors/at-once", test_at_once);
    g_test_add_func("/memory-fault/errors/deferred", test_deferred);
    return g_test_run();
}

/*
 * Unit tests for memory faults that are nobody's, and for who was there before
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * The handler for a signal is installed once in a process's life, so that each
 * test is a process of its own.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/memory-fault.h"
#include "memory-fault-helpers.h"

/* The signal that a test is about */
static int tested;

/* Some handler is there, but for another range */
static void add_other_handler(void)
{
    static Opener other;

    opener_add(&other, tested, fault_map(tested, 1), fault_page_size());
    write_byte(other.handler.start);
    g_assert_cmpint(other.calls, ==, 1);
}

static void child_write(void)
{
    add_other_handler();
    write_byte(fault_map(tested, 1));
}

static void *write_thread(void *opaque)
{
    write_byte(opaque);
    return NULL;
}

static void child_write_thread(void)
{
    add_other_handler();
    in_thread(write_thread, fault_map(tested, 1));
}

static void child_write_refused(void)
{
    uint8_t *page = fault_map(tested, 1);
    Opener o = { .refuse = true };

    opener_add(&o, tested, page, fault_page_size());
    write_byte(page);
}

static void child_write_removed(void)
{
    uint8_t *page = fault_map(tested, 1);
    Opener o = { };

    opener_add(&o, tested, page, fault_page_size());
    write_byte(page);
    memory_fault_handler_remove(&o.handler);
    fault_deny(tested, page);
    /* It is tried again, but not for ever */
    write_byte(page);
}

static void child_raise(void)
{
    add_other_handler();
    raise(tested);
}

static void child_kill(void)
{
    add_other_handler();
    kill(getpid(), tested);
}

#ifdef CONFIG_LINUX
static void child_memory_error(void)
{
    add_other_handler();
    send_memory_error(BUS_MCEERR_AO, fault_map(tested, 1));
}
#endif

static void child_fine(void)
{
    add_other_handler();
}

static void handle(void (*handler)(int))
{
    struct sigaction action = { .sa_handler = handler };

    g_assert_cmpint(sigaction(tested, &action, NULL), ==, 0);
}

static void test_kill(const void *signal)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    tested = GPOINTER_TO_INT(signal);
    /* Sanitizers have a handler of their own, which does not kill */
    handle(SIG_DFL);
    g_assert_cmpint(killed_by(child_fine), ==, 0);
    g_assert_cmpint(killed_by(child_write), ==, tested);
    g_assert_cmpint(killed_by(child_write_thread), ==, tested);
    g_assert_cmpint(killed_by(child_write_refused), ==, tested);
    g_assert_cmpint(killed_by(child_write_removed), ==, tested);
    g_assert_cmpint(killed_by(child_raise), ==, tested);
    g_assert_cmpint(killed_by(child_kill), ==, tested);
#ifdef CONFIG_LINUX
    if (tested == SIGBUS) {
        /* Nothing repeats it */
        g_assert_cmpint(killed_by(child_memory_error), ==, SIGBUS);
    }
#endif
}

/* If it was ignored before: signals that were sent are, faults cannot be */
static void test_ignored(const void *signal)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    tested = GPOINTER_TO_INT(signal);
    handle(SIG_IGN);
    g_assert_cmpint(killed_by(child_raise), ==, 0);
    g_assert_cmpint(killed_by(child_kill), ==, 0);
    g_assert_cmpint(killed_by(child_write), ==, tested);
}

static struct {
    int calls;
    int sent;
    void *host;
} previous;

static void previous_sigaction(int sig, siginfo_t *info, void *context)
{
    g_assert_cmpint(sig, ==, tested);
    g_assert_nonnull(context);
    previous.calls++;
    if (info->si_code <= 0) {
        previous.sent++;
        return;
    }
    previous.host = info->si_addr;
    fault_allow(info->si_addr);
}

static void previous_handler(int sig)
{
    g_assert_cmpint(sig, ==, tested);
    previous.calls++;
    fault_allow(previous.host);
}

static void test_chain_sigaction(const void *signal)
{
    struct sigaction action = {
        .sa_sigaction = previous_sigaction,
        .sa_flags = SA_SIGINFO,
    };
    Opener o = { .refuse = true };
    uint8_t *page;

    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    tested = GPOINTER_TO_INT(signal);
    g_assert_cmpint(sigaction(tested, &action, NULL), ==, 0);
    page = fault_map(tested, 1);
    add_other_handler();
    g_assert_cmpint(previous.calls, ==, 0);

    write_byte(page + 42);
    g_assert_cmpint(previous.calls, ==, 1);
    g_assert_true(previous.host == page + 42);

    fault_deny(tested, page);
    opener_add(&o, tested, NULL, SIZE_MAX);
    write_byte(page);
    g_assert_cmpint(o.calls, ==, 1);
    g_assert_cmpint(previous.calls, ==, 2);

    /* A signal that was sent is no fault, whatever its address looks like */
    raise(tested);
    kill(getpid(), tested);
    g_assert_cmpint(previous.sent, ==, 2);
    g_assert_cmpint(o.calls, ==, 1);
}

static void test_chain_handler(const void *signal)
{
    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    tested = GPOINTER_TO_INT(signal);
    handle(previous_handler);
    add_other_handler();
    previous.host = fault_map(tested, 1);
    write_byte(previous.host);
    g_assert_cmpint(previous.calls, ==, 1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int signal;
    } signals[] = {
        { "sigsegv", SIGSEGV },
        { "sigbus", SIGBUS },
    };
    static const struct {
        const char *name;
        GTestDataFunc fn;
    } tests[] = {
        { "kill", test_kill },
        { "ignored", test_ignored },
        { "chain/sigaction", test_chain_sigaction },
        { "chain/handler", test_chain_handler },
    };
    size_t i, j;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < ARRAY_SIZE(signals); i++) {
        for (j = 0; j < ARRAY_SIZE(tests); j++) {
            g_autofree char *path = g_strdup_printf("/memory-fault/%s/%s",
                                                    signals[i].name,
                                                    tests[j].name);

            g_test_add_data_func(path, GINT_TO_POINTER(signals[i].signal),
                                 tests[j].fn);
        }
    }
    return g_test_run();
}

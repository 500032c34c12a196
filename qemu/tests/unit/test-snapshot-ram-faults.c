/*
 * Unit tests for the RAM of a background snapshot: faults that no trap caused
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * They end as they would without a snapshot.  But one that was on its way while
 * its page was released is the trap's.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/thread.h"
#include "memory-fault-helpers.h"
#include "real-write-traps.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

#define NUM_PAGES 64
/* Not saved together with the first */
#define FAR_PAGE 32

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

/* A signal that is held back on its way to the handler */
static struct {
    struct sigaction next;
    bool held;
    bool let_go;
} hold;

/* The trap that a test is about, and its signal */
static const WriteTrapOps *tested;
static int tested_signal;

static uint8_t *host;
static TestRAM *ram;

static void take_snapshot(void)
{
    ram = test_ram_new(NUM_PAGES, true, LONG_MS);
    test_ram_add(ram, host, NUM_PAGES, PAGE_SIZE, true);
    test_ram_arm(ram, tested);
}

/* Have the host deny all accesses to a page, for another reason than a trap */
static uint8_t *lose(size_t page)
{
    uint8_t *lost = host + page * PAGE_SIZE;

    if (tested_signal == SIGBUS) {
        fault_deny(SIGBUS, lost);
    } else {
        g_assert_true(mmap(lost, PAGE_SIZE, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                           0) == lost);
    }
    return lost;
}

static void *write_thread(void *opaque)
{
    write_byte(opaque);
    return NULL;
}

static void child_write_saved(void)
{
    take_snapshot();
    write_byte(host);
    in_thread(write_thread, lose(0));
}

static void child_write_stopped(void)
{
    take_snapshot();
    snapshot_ram_stop(ram->ram);
    in_thread(write_thread, lose(0));
}

/* As KVM tells */
static void child_fault_saved(void)
{
    int i;

    take_snapshot();
    write_byte(host);
    for (i = 0; memory_fault_handle(lose(0)); i++) {
        g_assert_cmpint(i, <, 3);
    }
    raise(tested_signal);
}

/* What is lost before it is saved cannot be read in order to save it */

static void child_write(void)
{
    take_snapshot();
    in_thread(write_thread, lose(0));
}

static void child_fault(void)
{
    take_snapshot();
    memory_fault_handle(lose(0));
}

static void child_release(void)
{
    take_snapshot();
    snapshot_ram_release(ram->ram, lose(0), PAGE_SIZE);
}

static void child_scan(void)
{
    take_snapshot();
    lose(0);
    test_ram_scan(ram);
}

static void child_fine(void)
{
    take_snapshot();
    write_byte(host);
    test_ram_save(ram, 0);
    test_ram_check(ram);
}

static void test_lost(void)
{
    g_assert_cmpint(killed_by(child_fine), ==, 0);
    g_assert_cmpint(killed_by(child_write_saved), ==, tested_signal);
    g_assert_cmpint(killed_by(child_write_stopped), ==, tested_signal);
    g_assert_cmpint(killed_by(child_fault_saved), ==, tested_signal);
    g_assert_cmpint(killed_by(child_write), ==, tested_signal);
    g_assert_cmpint(killed_by(child_fault), ==, tested_signal);
    g_assert_cmpint(killed_by(child_release), ==, tested_signal);
    g_assert_cmpint(killed_by(child_scan), ==, tested_signal);
}

static void hold_signal(int sig, siginfo_t *info, void *context)
{
    qatomic_set(&hold.held, true);
    while (!qatomic_read(&hold.let_go)) {
        g_usleep(10);
    }
    qatomic_set(&hold.let_go, false);
    hold.next.sa_sigaction(sig, info, context);
}

#define NUM_SNAPSHOTS 3

/* How many snapshots have been begun */
static int begun;

/* The pages in turn: each snapshot begins with the one before it ended with */
static size_t first_page(int snapshot)
{
    return snapshot % 2 ? FAR_PAGE : 0;
}

/* Each page is written again later on */
static void *late_thread(void *opaque)
{
    int i;

    for (i = 0; i < NUM_SNAPSHOTS; i++) {
        uint8_t *first = host + first_page(i) * PAGE_SIZE;

        while (qatomic_read(&begun) <= i) {
            g_usleep(10);
        }
        /* The last handler's removal explains no fault of this snapshot */
        while (memory_fault_handle(&i)) {
            ;
        }
        write_byte(first);
        write_byte(first + PAGE_SIZE / 2);
        write_byte(host + first_page(i + 1) * PAGE_SIZE);
        write_byte(first);
    }
    return NULL;
}

static void release_held(size_t page)
{
    while (!qatomic_read(&hold.held)) {
        g_usleep(10);
    }
    qatomic_set(&hold.held, false);
    snapshot_ram_release(ram->ram, host + page * PAGE_SIZE, PAGE_SIZE);
    qatomic_set(&hold.let_go, true);
    while (qatomic_read(&hold.let_go)) {
        g_usleep(10);
    }
}

/* One thread's faults that are late each time, at the same addresses */
static void child_late(void)
{
    struct sigaction action = {
        .sa_sigaction = hold_signal,
        .sa_flags = SA_SIGINFO,
    };
    QemuThread thread;
    int i;

    qemu_thread_create(&thread, "late", late_thread, NULL,
                       QEMU_THREAD_JOINABLE);
    for (i = 0; i < NUM_SNAPSHOTS; i++) {
        take_snapshot();
        if (i == 0) {
            g_assert_cmpint(sigaction(tested_signal, &action, &hold.next), ==,
                            0);
        }
        qatomic_set(&begun, i + 1);
        release_held(first_page(i));
        release_held(first_page(i + 1));
        test_ram_save(ram, 0);
        test_ram_check(ram);
        g_assert_cmpuint(test_ram_stats(ram).faults, ==, 2);
        test_ram_free(ram);
    }
    qemu_thread_join(&thread);
}

static void test_late(void)
{
    g_assert_cmpint(killed_by(child_late), ==, 0);
}

typedef struct Test {
    const WriteTrapOps *ops;
    void (*fn)(void);
} Test;

static void run(const void *opaque)
{
    const Test *test = opaque;

    tested = test->ops;
    tested_signal = tested->raises_sigbus ? SIGBUS : SIGSEGV;
    host = test_map(NUM_PAGES);
    test->fn();
    test_unmap(host, NUM_PAGES);
}

static void add_test(const WriteTrapOps *ops, const char *name,
                     void (*fn)(void))
{
    g_autofree char *path = g_strdup_printf("/snapshot-ram/faults/%s/%s",
                                            ops->name, name);
    Test *test = g_new(Test, 1);

    *test = (Test) { ops, fn };
    g_test_add_data_func_full(path, test, (GTestDataFunc)run, g_free);
}

int main(int argc, char **argv)
{
    const WriteTrapOps *const *trap;

    g_test_init(&argc, &argv, NULL);
    trap = real_traps();
    g_assert_nonnull(write_trap_find("mprotect"));
#ifdef CONFIG_LINUX
    g_assert_nonnull(write_trap_find("uffd-signal"));
    g_assert_nonnull(write_trap_find("uffd-thread"));
#endif
    for (; *trap; trap++) {
        if (!(*trap)->in_thread) {
            continue;
        }
        if (!real_trap_available(*trap, NULL)) {
            g_autofree char *path = g_strdup_printf("/snapshot-ram/faults/%s",
                                                    (*trap)->name);

            g_test_add_data_func(path, *trap, real_trap_skip);
            continue;
        }
        add_test(*trap, "lost", test_lost);
        add_test(*trap, "late", test_late);
    }
    return g_test_run();
}

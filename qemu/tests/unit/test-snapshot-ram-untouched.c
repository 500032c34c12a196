/*
 * Unit tests for the RAM of a background snapshot: memory that does not exist
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "fake-write-trap.h"
#include "snapshot-ram-helpers.h"

#define LONG_MS 60000

/* 64 MiB, aligned to huge pages */
#define NUM_PAGES (16 * KiB)

static uint8_t *map_untouched(void)
{
    uint8_t *host = qemu_anon_ram_alloc(NUM_PAGES * PAGE_SIZE, NULL, false,
                                        true);

    g_assert_nonnull(host);
    /* Else the host may have more come into being than what is touched */
    madvise(host, NUM_PAGES * PAGE_SIZE, MADV_NOHUGEPAGE);
    return host;
}

static size_t count_existing(const uint8_t *host)
{
    g_autofree unsigned char *in_core = g_malloc(NUM_PAGES);
    size_t i, count = 0;

    g_assert_cmpint(mincore((void *)host, NUM_PAGES * PAGE_SIZE, in_core), ==,
                    0);
    for (i = 0; i < NUM_PAGES; i++) {
        count += in_core[i] & 1;
    }
    return count;
}

/* The same as test_ram_arm(), which reads all to compare with it */
static void arm(TestRAM *t, TestBlock *b, const WriteTrapOps *trap)
{
    b->expected = g_malloc0(NUM_PAGES * PAGE_SIZE);
    snapshot_ram_set_trap(t->ram, trap, &error_abort);
    snapshot_ram_arm(t->ram, &error_abort);
}

/* Nothing is read, nor copied, and one slot does for very many pages */
static void test_scan(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(128, false, LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);

    host[5000 * PAGE_SIZE] = 1;
    arm(t, b, &fake_trap_ops);
    b->expected[5000 * PAGE_SIZE] = 1;
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(test_ram_stats(t).untouched_pages, ==, NUM_PAGES - 1);
    g_assert_cmpuint(t->saved_zero, ==, NUM_PAGES - 1);
    g_assert_cmpuint(page_buffer_peak(t->buffer), ==, 64);
    g_assert_cmpuint(count_existing(host), ==, 1);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* What the trap leaves alone is written at will, and is zero in the image */
static void test_not_armed(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(128, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    size_t page;

    memset(host + 100 * PAGE_SIZE, 1, PAGE_SIZE);
    arm(t, b, &fake_trap_existing_ops);
    memset(b->expected + 100 * PAGE_SIZE, 1, PAGE_SIZE);
    for (page = 101; page < NUM_PAGES; page += 7) {
        host[page * PAGE_SIZE] = 2;
    }
    test_ram_save(t, 0);
    test_ram_check(t);
    /* It is called for what exists, and what lies around that */
    g_assert_cmpint(fake_trap.releases, ==, 1);
    g_assert_cmpuint(test_ram_stats(t).untouched_pages, ==, NUM_PAGES - 1);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* A write, or a call for many, where the trap stops them as well */
static void test_write(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(128, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);

    host[100 * PAGE_SIZE] = 1;
    arm(t, b, &fake_trap_ops);
    b->expected[100 * PAGE_SIZE] = 1;

    /* The huge page that may come to be there, and it takes a slot */
    g_assert_true(fake_write(host + 1000 * PAGE_SIZE));
    g_assert_true(fake_trap.last_host == host + 2 * MiB);
    g_assert_cmpuint(fake_trap.last_size, ==, 2 * MiB);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 512);
    /* Where there is anything, it is the neighbourhood as ever */
    g_assert_true(fake_write(host + 200 * PAGE_SIZE));
    g_assert_cmpuint(fake_trap.last_size, ==, 16 * PAGE_SIZE);
    while (test_ram_drain(t)) {
        ;
    }

    snapshot_ram_release(t->ram, host + 1025 * PAGE_SIZE, 5000 * PAGE_SIZE);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 512 + 16 + 5000);
    g_assert_false(fake_armed(host + 1025 * PAGE_SIZE));
    g_assert_false(fake_armed(host + 6024 * PAGE_SIZE));
    g_assert_true(fake_armed(host + 6025 * PAGE_SIZE));
    g_assert_cmpuint(count_existing(host), ==, 1);

    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

#define SLOW_MS 5

static void slow_release(void *host, size_t size)
{
    g_usleep(SLOW_MS * 1000);
}

/* With few slots left it is the page alone, and one slot does for it */
static void test_scarce(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(64, true, 0);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    uint32_t slots[60];
    bool waited = false;

    host[0] = 1;
    arm(t, b, &fake_trap_ops);
    b->expected[0] = 1;
    g_assert_cmpuint(page_buffer_take(t->buffer, slots, 60, 60, true, 0,
                                      &waited), ==, 60);
    g_assert_true(fake_write(host + 1023 * PAGE_SIZE));
    g_assert_true(fake_trap.last_host == host + 1023 * PAGE_SIZE);
    g_assert_cmpuint(fake_trap.last_size, ==, PAGE_SIZE);
    g_assert_null(snapshot_ram_failure(t->ram));
    page_buffer_give(t->buffer, slots, 60);
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* Let urgent calls, of which none waits for a slot, save page after page */
static TestRAM *save_urgently(uint8_t *host, size_t num_calls,
                              size_t pages_per_call, int stall_limit_ms)
{
    TestRAM *t = test_ram_new(128, true, stall_limit_ms);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    size_t i;

    for (i = 0; i < NUM_PAGES; i++) {
        host[i * PAGE_SIZE] = 0;
    }
    arm(t, b, &fake_trap_ops);
    fake_trap.before_release = slow_release;
    test_is_urgent = true;
    for (i = 0; i < num_calls; i++) {
        snapshot_ram_release(t->ram, host + i * pages_per_call * PAGE_SIZE,
                             pages_per_call * PAGE_SIZE);
        test_ram_drain(t);
    }
    test_is_urgent = false;
    g_assert_cmpuint(test_ram_stats(t).waits, ==, 0);
    return t;
}

/* What takes its time, but not for want of room, is no reason to fail */
static void test_urgent_calls(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = save_urgently(host, 3 * TEST_URGENT_LIMIT_MS / SLOW_MS, 16,
                               LONG_MS);

    g_assert_null(snapshot_ram_failure(t->ram));
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* But a single call may not go on for ever */
static void test_urgent_call(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = save_urgently(host, 1, NUM_PAGES, TEST_URGENT_LIMIT_MS);

    g_assert_nonnull(strstr(snapshot_ram_failure(t->ram), "QEMU itself"));
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* Each page is saved once, whoever comes across a part of a run */
static void test_claimed(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(128, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    size_t page;

    bitmap_clear(b->save, 3000, 77);
    host[0] = 1;
    arm(t, b, &fake_trap_ops);
    b->expected[0] = 1;
    /* So many that the slots for a run do not suffice */
    for (page = 513; page < NUM_PAGES; page += 3) {
        host[page * PAGE_SIZE] = 0;
    }
    for (page = 1000; page < 4000; page += 2) {
        snapshot_ram_release(t->ram, host + page * PAGE_SIZE, 1);
        test_ram_drain(t);
    }
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(t->saved, ==, NUM_PAGES - 77);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

#define PART (NUM_PAGES / 2)

/* A thread that scans, and which stands still when it is to release that */
typedef struct Scanner {
    QemuThread thread;
    TestRAM *t;
    bool entered;
    bool leave;
} Scanner;

static Scanner scanners[2];

static void part_release(void *host, size_t size)
{
    size_t page = ((uint8_t *)host - fake_trap.start) / PAGE_SIZE;
    Scanner *s = &scanners[page / PART];

    qatomic_set(&s->entered, true);
    while (!qatomic_read(&s->leave)) {
        g_usleep(100);
    }
}

static void *scanner_thread(void *opaque)
{
    Scanner *s = opaque;

    g_assert_true(test_ram_scan(s->t));
    return NULL;
}

/* Two at a time run out of slots amid their runs: nothing is passed over */
static void test_go_back(void)
{
    uint8_t *host = map_untouched();
    TestRAM *t = test_ram_new(256, true, LONG_MS);
    size_t i, page;

    for (i = 0; i < ARRAY_SIZE(scanners); i++) {
        TestBlock *b = test_ram_add(t, host + i * PART * PAGE_SIZE, PART,
                                    PAGE_SIZE, true);

        for (page = 0; page < PART; page += 2) {
            bitmap_clear(b->save, page, 1);
        }
        b->expected = g_malloc0(PART * PAGE_SIZE);
        scanners[i] = (Scanner) { .t = t };
    }
    snapshot_ram_set_trap(t->ram, &fake_trap_ops, &error_abort);
    snapshot_ram_arm(t->ram, &error_abort);
    fake_trap.before_release = part_release;
    for (i = 0; i < ARRAY_SIZE(scanners); i++) {
        qemu_thread_create(&scanners[i].thread, "scanner", scanner_thread,
                           &scanners[i], QEMU_THREAD_JOINABLE);
        while (!qatomic_read(&scanners[i].entered)) {
            g_usleep(100);
        }
    }
    /* The one that is behind is the first to tell */
    for (i = 0; i < ARRAY_SIZE(scanners); i++) {
        qatomic_set(&scanners[i].leave, true);
        qemu_thread_join(&scanners[i].thread);
    }
    fake_trap.before_release = NULL;
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/untouched/scan", test_scan);
    g_test_add_func("/snapshot-ram/untouched/not-armed", test_not_armed);
    g_test_add_func("/snapshot-ram/untouched/write", test_write);
    g_test_add_func("/snapshot-ram/untouched/scarce", test_scarce);
    g_test_add_func("/snapshot-ram/untouched/urgent-calls", test_urgent_calls);
    g_test_add_func("/snapshot-ram/untouched/urgent-call", test_urgent_call);
    g_test_add_func("/snapshot-ram/untouched/claimed", test_claimed);
    g_test_add_func("/snapshot-ram/untouched/go-back", test_go_back);
    return g_test_run();
}

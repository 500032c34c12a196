/*
 * Unit tests for the RAM of a background snapshot: the one door
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * With a write trap that stops nobody, so that the tests decide what is
 * written when, and see what is released.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "fake-write-trap.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

/* What a write saves around it */
#define AROUND 16
#define AROUND_NOT_BUSY 4

/* More writes than it takes to be busy */
#define NUM_FAR 40

/* Write to a page, and change it */
static void write_page(TestBlock *b, size_t page)
{
    g_assert_true(fake_write(b->host + page * PAGE_SIZE + 42));
    memset(b->host + page * PAGE_SIZE, 0xff, PAGE_SIZE);
}

static void assert_released(TestBlock *b, size_t first, size_t num_pages)
{
    g_assert_true(fake_trap.last_host == b->host + first * PAGE_SIZE);
    g_assert_cmpuint(fake_trap.last_size, ==, num_pages * PAGE_SIZE);
}

static void test_scan(void)
{
    uint8_t *host = test_map(1000);
    TestRAM *t = test_ram_new(64, true, LONG_MS);

    test_ram_add(t, host, 1000, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    g_assert_cmpuint(fake_trap.num_armed, ==, 1000);

    /* It leaves half of the buffer to others */
    g_assert_true(test_ram_scan(t));
    g_assert_false(test_ram_scan(t));
    g_assert_false(snapshot_ram_scan_done(t->ram));
    g_assert_cmpuint(page_buffer_peak(t->buffer), ==, 32);
    g_assert_cmpint(fake_trap.releases, ==, 1);

    test_ram_save(t, 0);
    g_assert_true(snapshot_ram_scan_done(t->ram));
    g_assert_false(test_ram_scan(t));
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    g_assert_cmpuint(test_ram_stats(t).scan_pages, ==, 1000);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 0);
    test_ram_free(t);
    test_unmap(host, 1000);
}

static void test_fault_around(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 100, PAGE_SIZE, true);
    SnapshotRAMStats stats;

    test_ram_arm(t, &fake_trap_ops);

    /* The aligned neighbourhood, released with one call */
    write_page(b, 37);
    assert_released(b, 32, AROUND);
    g_assert_cmpint(fake_trap.releases, ==, 1);
    /* Nobody is stopped there any more */
    write_page(b, 32);
    write_page(b, 47);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 1);

    /* It ends with the block */
    write_page(b, 99);
    assert_released(b, 96, 4);
    while (test_ram_drain(t)) {
        ;
    }
    g_assert_cmpuint(t->saved, ==, AROUND + 4);

    /* When slots are scarce, the page alone; 48 of 64 are taken then */
    write_page(b, 48);
    write_page(b, 64);
    write_page(b, 80);
    write_page(b, 2);
    assert_released(b, 2, 1);
    /* And the rest of the neighbourhood later */
    while (test_ram_drain(t)) {
        ;
    }
    write_page(b, 0);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 5 * AROUND + 4);
    g_assert_false(fake_armed(b->host));
    g_assert_false(fake_armed(b->host + 15 * PAGE_SIZE));

    test_ram_save(t, 0);
    test_ram_check(t);
    stats = test_ram_stats(t);
    g_assert_cmpuint(stats.faults, ==, 7);
    g_assert_cmpuint(stats.waits, ==, 0);
    g_assert_cmpuint(stats.fault_pages + stats.scan_pages, ==, 100);
    g_assert_cmpuint(stats.zero_pages, ==, 20);
    g_assert_cmpuint(t->saved_zero, ==, 20);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    test_unmap(host, 100);
}

/* A guest that writes now and then has less saved at a time */
static void test_fault_around_not_busy(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new_busy(64, true, 0, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 100, PAGE_SIZE, true);

    test_ram_arm(t, &fake_trap_ops);
    write_page(b, 37);
    assert_released(b, 36, AROUND_NOT_BUSY);
    write_page(b, 99);
    assert_released(b, 96, AROUND_NOT_BUSY);
    test_ram_free(t);

    test_unmap(host, 100);
}

/* It takes some writes that follow one another to be busy, not only two */
static void test_fault_around_busy(void)
{
    uint8_t *host = test_map(NUM_FAR * AROUND);
    TestRAM *t = test_ram_new_busy(4096, true, 60 * NANOSECONDS_PER_SECOND,
                                   LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_FAR * AROUND, PAGE_SIZE, true);
    size_t i;

    test_ram_arm(t, &fake_trap_ops);
    for (i = 0; i < NUM_FAR; i++) {
        write_page(b, i * AROUND);
        if (i < 4) {
            assert_released(b, i * AROUND, AROUND_NOT_BUSY);
        }
    }
    assert_released(b, (NUM_FAR - 1) * AROUND, AROUND);
    test_ram_free(t);
    test_unmap(host, NUM_FAR * AROUND);
}

static void test_zero_not_detected(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, false, LONG_MS);
    size_t page;

    /* What does not exist is zero without having been looked at */
    for (page = 0; page < 100; page += 5) {
        qatomic_set(host + page * PAGE_SIZE, 0);
    }
    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(t->saved_zero, ==, 0);
    g_assert_cmpuint(test_ram_stats(t).zero_pages, ==, 0);
    test_ram_free(t);
    test_unmap(host, 100);
}

/* Added in no order; with holes between, where nobody is at home */
static void test_blocks(void)
{
    static const size_t first[] = { 60, 0, 40, 10 };
    static const size_t num_pages[] = { 1, 9, 17, 20 };
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    size_t i;

    for (i = 0; i < ARRAY_SIZE(first); i++) {
        test_ram_add(t, host + first[i] * PAGE_SIZE, num_pages[i], PAGE_SIZE,
                     true);
    }
    test_ram_arm(t, &fake_trap_ops);
    g_assert_true(fake_trap.start == host);
    g_assert_cmpuint(fake_trap.size, ==, 61 * PAGE_SIZE);
    g_assert_cmpint(fake_trap.arms, ==, 4);
    g_assert_cmpuint(fake_trap.num_armed, ==, 47);

    g_assert_false(fake_trap.fault(host - 1, fake_trap.opaque));
    g_assert_false(fake_trap.fault(host + 9 * PAGE_SIZE, fake_trap.opaque));
    g_assert_false(fake_trap.fault(host + 58 * PAGE_SIZE, fake_trap.opaque));
    g_assert_false(fake_trap.fault(host + 61 * PAGE_SIZE, fake_trap.opaque));
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 0);
    snapshot_ram_release(t->ram, host + 9 * PAGE_SIZE, 1);
    g_assert_cmpint(fake_trap.releases, ==, 0);

    /* The last byte before a hole, and the first one after it */
    g_assert_true(fake_write(host + 9 * PAGE_SIZE - 1));
    g_assert_true(fake_write(host + 10 * PAGE_SIZE));
    g_assert_true(fake_write(host + 60 * PAGE_SIZE));
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 9 + AROUND + 1);

    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 100);
}

static void test_save_bits(void)
{
    uint8_t *host = test_map(200);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 200, PAGE_SIZE, true);

    bitmap_clear(b->save, 3, 60);
    bitmap_clear(b->save, 100, 1);
    test_ram_arm(t, &fake_trap_ops);

    /* Pages that are not saved are released all the same */
    write_page(b, 20);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 0);
    write_page(b, 100);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, AROUND - 1);

    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(t->saved, ==, 200 - 61);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    test_ram_free(t);
    test_unmap(host, 200);
}

static void test_read_only(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);

    test_ram_add(t, host, 40, PAGE_SIZE, false);
    test_ram_add(t, host + 50 * PAGE_SIZE, 40, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    g_assert_cmpuint(fake_trap.num_armed, ==, 40);
    g_assert_false(fake_trap.fault(host, fake_trap.opaque));

    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    test_unmap(host, 100);
}

/* The host's pages are larger than ours, and the block is no multiple */
static void test_huge(void)
{
    uint8_t *host = test_map(2048);
    TestRAM *t = test_ram_new(512, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 1027, 2 * MiB, true);
    SnapshotBlockInfo block = {
        .name = "huge",
        .host = host,
        .size = 8 * MiB,
        .host_page_size = 2 * MiB,
        .writable = true,
        .fd = -1,
    };
    Error *err = NULL;

    test_ram_arm(t, &fake_trap_ops);
    g_assert_cmpuint(fake_trap.size, ==, 3 * 2 * MiB);
    g_assert_cmpuint(fake_trap.num_armed, ==, 3 * 512);

    write_page(b, 700);
    assert_released(b, 512, 512);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 512);
    /* The scanner cannot have it before the buffer is empty */
    g_assert_false(test_ram_scan(t));
    while (test_ram_drain(t)) {
        ;
    }

    /* What lies behind the block in its last page is let go with it */
    g_assert_true(fake_write(host + 1500 * PAGE_SIZE));
    assert_released(b, 1024, 512);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 512 + 3);

    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);

    /* Such a page must fit into the buffer, and into a thread's stack */
    t = test_ram_new(511, true, LONG_MS);
    g_assert_false(snapshot_ram_add_block(t->ram, &block, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "'huge'"));
    error_free_or_abort(&err);
    test_ram_free(t);
    t = test_ram_new(2048, true, LONG_MS);
    block.host_page_size = 4 * MiB;
    g_assert_false(snapshot_ram_add_block(t->ram, &block, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "'huge'"));
    error_free_or_abort(&err);
    test_ram_free(t);
    test_unmap(host, 2048);
}

/* Release more than one window, which begins and ends anywhere in a page */
static void test_release(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(128, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 100, PAGE_SIZE, true);

    test_ram_arm(t, &fake_trap_ops);
    snapshot_ram_release(t->ram, host, 0);
    g_assert_cmpuint(fake_trap.num_armed, ==, 100);

    snapshot_ram_release(t->ram, host + 15 * PAGE_SIZE + 4000, 100);
    g_assert_cmpuint(fake_trap.num_armed, ==, 100 - 2 * AROUND);
    g_assert_false(fake_armed(host));
    g_assert_false(fake_armed(host + 31 * PAGE_SIZE));
    memset(host, 0xff, 2 * AROUND * PAGE_SIZE);

    /* It may reach beyond the block */
    snapshot_ram_release(t->ram, host + 64 * PAGE_SIZE, 1 * MiB);
    g_assert_cmpuint(fake_trap.num_armed, ==, 32);
    memset(b->host + 64 * PAGE_SIZE, 0xff, 36 * PAGE_SIZE);

    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 100);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/scan", test_scan);
    g_test_add_func("/snapshot-ram/fault-around", test_fault_around);
    g_test_add_func("/snapshot-ram/fault-around-busy", test_fault_around_busy);
    g_test_add_func("/snapshot-ram/fault-around-not-busy",
                    test_fault_around_not_busy);
    g_test_add_func("/snapshot-ram/zero-not-detected", test_zero_not_detected);
    g_test_add_func("/snapshot-ram/blocks", test_blocks);
    g_test_add_func("/snapshot-ram/save-bits", test_save_bits);
    g_test_add_func("/snapshot-ram/read-only", test_read_only);
    g_test_add_func("/snapshot-ram/huge", test_huge);
    g_test_add_func("/snapshot-ram/release", test_release);
    return g_test_run();
}

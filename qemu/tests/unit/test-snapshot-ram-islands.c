/*
 * Unit tests for the RAM of a background snapshot: how many islands it makes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * A range that is released amid armed ones is an island.  The host may bear
 * only so many of them, such as when each is a mapping.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/thread.h"
#include "fake-write-trap.h"
#include "snapshot-ram-helpers.h"

#define LONG_MS 60000

/* What one thread saves at a time, at most */
#define MAX_PAGES 512

#define NUM_PAGES 4096

static void drain_all(TestRAM *t)
{
    while (test_ram_drain(t)) {
        ;
    }
}

static void write_page(TestBlock *b, size_t page)
{
    g_assert_true(fake_write(b->host + page * PAGE_SIZE));
}

/* Assert that just these pages have been released since the last time */
static void assert_released(TestBlock *b, unsigned long *released,
                            size_t first, size_t end)
{
    size_t page;

    bitmap_set(released, first, end - first);
    for (page = 0; page < b->num_pages; page++) {
        g_assert_cmpint(fake_armed(b->host + page * PAGE_SIZE), ==,
                        !test_bit(page, released));
    }
}

static void test_windows(void)
{
    g_autofree unsigned long *released = bitmap_new(NUM_PAGES);
    g_autofree unsigned long *none = bitmap_new(100);
    uint8_t *host = test_map(NUM_PAGES + 200);
    TestRAM *t = test_ram_new(2 * NUM_PAGES, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    TestBlock *other = test_ram_add(t, host + (NUM_PAGES + 100) * PAGE_SIZE,
                                    100, PAGE_SIZE, true);
    int releases;

    fake_trap.max_islands = 2;
    test_ram_arm(t, &fake_trap_ops);
    write_page(b, 100);
    assert_released(b, released, 96, 112);
    write_page(b, 3000);
    assert_released(b, released, 2992, 3008);
    g_assert_cmpuint(fake_trap.islands, ==, 2);
    drain_all(t);

    /* From the island to the left, and up to the unit; to the right likewise */
    write_page(b, 150);
    assert_released(b, released, 112, 151);
    write_page(b, 2900);
    assert_released(b, released, 2900, 2992);
    write_page(b, 3008);
    assert_released(b, released, 3008, 3009);
    write_page(b, 2899);
    assert_released(b, released, 2899, 2900);
    drain_all(t);

    /* The nearer one, if it takes several runs to reach the unit */
    releases = fake_trap.releases;
    write_page(b, 151 + 2 * MAX_PAGES - 1);
    assert_released(b, released, 151, 151 + 2 * MAX_PAGES);
    g_assert_cmpint(fake_trap.releases, ==, releases + 2);
    drain_all(t);
    releases = fake_trap.releases;
    write_page(b, 2899 - MAX_PAGES - 1);
    assert_released(b, released, 2899 - MAX_PAGES - 1, 2899);
    g_assert_cmpint(fake_trap.releases, ==, releases + 2);
    drain_all(t);

    /* Islands that are not on both sides */
    write_page(b, 20);
    assert_released(b, released, 20, 96);
    write_page(b, NUM_PAGES - 1);
    assert_released(b, released, 3009, NUM_PAGES);
    write_page(b, 0);
    assert_released(b, released, 0, 20);
    g_assert_cmpuint(fake_trap.peak_islands, ==, 2);

    /* A block without any needs one */
    write_page(other, 50);
    assert_released(other, none, 48, 64);
    g_assert_cmpuint(fake_trap.islands, ==, 3);
    write_page(other, 90);
    assert_released(other, none, 64, 91);
    drain_all(t);

    test_ram_save(t, 0);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, NUM_PAGES + 200);
}

/* When two islands become one, there is room for another */
static void test_windows_joined(void)
{
    g_autofree unsigned long *released = bitmap_new(1000);
    uint8_t *host = test_map(1000);
    TestRAM *t = test_ram_new(256, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 1000, PAGE_SIZE, true);

    fake_trap.max_islands = 2;
    test_ram_arm(t, &fake_trap_ops);
    write_page(b, 100);
    assert_released(b, released, 96, 112);
    write_page(b, 130);
    assert_released(b, released, 128, 144);
    write_page(b, 118);
    assert_released(b, released, 112, 119);
    write_page(b, 119);
    assert_released(b, released, 119, 120);
    write_page(b, 120);
    assert_released(b, released, 120, 121);
    write_page(b, 125);
    assert_released(b, released, 125, 128);
    write_page(b, 122);
    assert_released(b, released, 121, 123);
    write_page(b, 124);
    assert_released(b, released, 124, 125);
    g_assert_cmpuint(fake_trap.islands, ==, 2);
    write_page(b, 123);
    assert_released(b, released, 123, 124);
    g_assert_cmpuint(fake_trap.islands, ==, 1);

    write_page(b, 500);
    assert_released(b, released, 496, 512);
    write_page(b, 600);
    assert_released(b, released, 512, 601);
    g_assert_cmpuint(fake_trap.peak_islands, ==, 2);

    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 1000);
}

/* Few slots are free, so that the way to the unit is a long one */
static void test_windows_scarce(void)
{
    g_autofree unsigned long *released = bitmap_new(1000);
    uint8_t *host = test_map(1000);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 1000, PAGE_SIZE, true);
    uint32_t slots[40];
    bool waited;

    fake_trap.max_islands = 1;
    test_ram_arm(t, &fake_trap_ops);
    write_page(b, 500);
    assert_released(b, released, 496, 512);
    drain_all(t);
    g_assert_cmpuint(page_buffer_take(t->buffer, slots, 40, 40, true, 0,
                                      &waited),
                     ==, 40);

    write_page(b, 512 + 20);
    assert_released(b, released, 512, 512 + 21);
    drain_all(t);
    write_page(b, 496 - 20);
    assert_released(b, released, 496 - 20, 496);
    g_assert_cmpuint(fake_trap.peak_islands, ==, 1);

    page_buffer_give(t->buffer, slots, 40);
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 1000);
}

#define NUM_WRITERS 4

typedef struct Writer {
    QemuThread thread;
    TestBlock *block;
    GRand *rand;
    bool *stop;
} Writer;

static void *writer_thread(void *opaque)
{
    Writer *w = opaque;

    while (!qatomic_read(w->stop)) {
        write_page(w->block, g_rand_int(w->rand) % w->block->num_pages);
    }
    return NULL;
}

static void test_threads(void)
{
    size_t max;

    for (max = 1; max <= 64; max *= 4) {
        uint8_t *host = test_map(NUM_PAGES);
        TestRAM *t = test_ram_new(256, true, LONG_MS);
        TestBlock *b = test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
        Writer writers[NUM_WRITERS];
        bool stop = false;
        size_t i;

        fake_trap.max_islands = max;
        test_ram_arm(t, &fake_trap_ops);
        for (i = 0; i < NUM_WRITERS; i++) {
            writers[i].block = b;
            writers[i].rand = g_rand_new_with_seed(g_test_rand_int());
            writers[i].stop = &stop;
            qemu_thread_create(&writers[i].thread, "writer", writer_thread,
                               &writers[i], QEMU_THREAD_JOINABLE);
        }
        test_ram_save(t, 100);
        qatomic_set(&stop, true);
        for (i = 0; i < NUM_WRITERS; i++) {
            qemu_thread_join(&writers[i].thread);
            g_rand_free(writers[i].rand);
        }

        /* Each writer may find room for one more, and so does the scanner */
        g_assert_cmpuint(fake_trap.peak_islands, <=, max + NUM_WRITERS + 1);
        g_assert_cmpuint(fake_trap.twice, ==, 0);
        test_ram_check(t);
        test_ram_free(t);
        test_unmap(host, NUM_PAGES);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/islands/windows", test_windows);
    g_test_add_func("/snapshot-ram/islands/windows-joined",
                    test_windows_joined);
    g_test_add_func("/snapshot-ram/islands/windows-scarce",
                    test_windows_scarce);
    g_test_add_func("/snapshot-ram/islands/threads", test_threads);
    return g_test_run();
}

/*
 * Unit tests for the RAM of a background snapshot: what is handed out, to many
 * threads
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "fake-write-trap.h"
#include "real-write-traps.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

#define LONG_MS 60000

/* Threads that take pages at a time, as those that write places in a file do */
typedef struct Takers {
    TestRAM *t;
    QemuMutex lock;
    QemuThread threads[4];
    /* How often a thread has got something */
    unsigned int times[4];
    int next;
} Takers;

static void *taker_thread(void *opaque)
{
    Takers *takers = opaque;
    int number = qatomic_fetch_inc(&takers->next);
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    size_t n;

    while ((n = snapshot_ram_next(takers->t->ram, pages))) {
        QEMU_LOCK_GUARD(&takers->lock);
        test_ram_take(takers->t, pages, n);
        takers->times[number]++;
    }
    return NULL;
}

static void takers_start(Takers *takers, TestRAM *t)
{
    size_t i;

    memset(takers, 0, sizeof(*takers));
    takers->t = t;
    qemu_mutex_init(&takers->lock);
    for (i = 0; i < ARRAY_SIZE(takers->threads); i++) {
        qemu_thread_create(&takers->threads[i], "taker", taker_thread, takers,
                           QEMU_THREAD_JOINABLE);
    }
}

static void takers_join(Takers *takers)
{
    size_t i;

    for (i = 0; i < ARRAY_SIZE(takers->threads); i++) {
        qemu_thread_join(&takers->threads[i]);
    }
    qemu_mutex_destroy(&takers->lock);
}

/* While the memory is written, each page comes out once and as it was */
static void test_contents(const void *trap)
{
    /* A large buffer, one that is full all the time, and the smallest */
    static const size_t num_slots[] = { 4096, 512, 8 };
    size_t round;

    for (round = 0; round < ARRAY_SIZE(num_slots); round++) {
        uint8_t *host = test_map(8192);
        TestRAM *t = test_ram_new(num_slots[round], true, LONG_MS);
        TestScribblers *scribblers;
        Takers takers;

        test_ram_add(t, host, 8192, PAGE_SIZE, true);
        test_ram_arm(t, trap);
        scribblers = test_scribblers_start(1, host, 8192);
        takers_start(&takers, t);
        takers_join(&takers);
        test_scribblers_stop(scribblers);

        g_assert_true(snapshot_ram_is_saved(t->ram));
        g_assert_null(snapshot_ram_failure(t->ram));
        test_ram_check(t);
        test_ram_free(t);
        test_unmap(host, 8192);
    }
}

/*
 * Memory that does not exist, with holes of what others have claimed: threads
 * that have too few slots for a piece leave the rest to be found again
 */
static void test_untouched(const void *trap)
{
    enum { PIECE = RAM_SOURCE_MAX_ZERO / PAGE_SIZE };
    size_t num_pages = 8 * PIECE, page;
    uint8_t *host = qemu_anon_ram_alloc(num_pages * PAGE_SIZE, NULL, false,
                                        true);
    TestRAM *t = test_ram_new(512, true, LONG_MS);
    Takers takers;

    test_ram_add(t, host, num_pages, PAGE_SIZE, true);
    test_ram_arm(t, trap);
    for (page = 0; page < num_pages; page += 2) {
        if (page % PIECE < 300) {
            set_bit(page, t->ram->blocks[0].claimed);
            clear_bit(page, t->blocks[0]->save);
        }
    }
    takers_start(&takers, t);
    takers_join(&takers);
    g_assert_true(snapshot_ram_is_saved(t->ram));
    test_ram_check(t);
    test_ram_free(t);
    qemu_anon_ram_free(host, num_pages * PAGE_SIZE);
}

/* Who stops waits for nobody, and all others end */
static void test_stop(void)
{
    uint8_t *host = test_map(4096);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    Takers takers;

    test_ram_add(t, host, 4096, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    takers_start(&takers, t);
    snapshot_ram_stop(t->ram);
    takers_join(&takers);
    g_assert_false(snapshot_ram_is_saved(t->ram));
    test_ram_free(t);
    test_unmap(host, 4096);
}

/* A run that can be written with one call: pages in order, so are their data */
static void test_order(void)
{
    uint8_t *host = test_map(2048);
    TestRAM *t = test_ram_new(2048, false, LONG_MS);
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    size_t i, n, runs = 0;

    test_ram_add(t, host, 2048, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    while ((n = snapshot_ram_next(t->ram, pages))) {
        g_assert_cmpuint(n, ==, SNAPSHOT_RAM_MAX_NEXT);
        for (i = 1; i < n; i++) {
            g_assert_cmpuint(pages[i].offset, ==,
                             pages[i - 1].offset + PAGE_SIZE);
            g_assert_true(pages[i].data == pages[i - 1].data + PAGE_SIZE);
        }
        test_ram_take(t, pages, n);
        runs++;
    }
    g_assert_cmpuint(runs, ==, 2048 / SNAPSHOT_RAM_MAX_NEXT);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 2048);
}

/* While one thread has the whole buffer, the other waits, and then goes on */
static void test_room(void)
{
    uint8_t *host = test_map(256);
    TestRAM *t = test_ram_new(64, false, LONG_MS);
    SnapshotPage pages[2][SNAPSHOT_RAM_MAX_NEXT];
    size_t n[2];
    Takers takers;

    test_ram_add(t, host, 256, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    n[0] = snapshot_ram_next(t->ram, pages[0]);
    g_assert_cmpuint(n[0], ==, 32);

    takers_start(&takers, t);
    g_usleep(20 * 1000);
    WITH_QEMU_LOCK_GUARD(&takers.lock) {
        g_assert_cmpuint(t->saved, ==, 0);
        test_ram_take(t, pages[0], n[0]);
    }
    takers_join(&takers);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 256);
}

static uint64_t bandwidth;

static uint64_t get_bandwidth(void)
{
    return qatomic_read(&bandwidth);
}

/* The scanner keeps to its bandwidth, what guest writes need does not wait */
static void test_bandwidth(void)
{
    uint8_t *host = test_map(8192);
    TestRAM *t = test_ram_new(1024, false, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 8192, PAGE_SIZE, true);
    int64_t began_us, us;
    size_t i;

    t->ram->config.bandwidth = get_bandwidth;
    test_ram_arm(t, &fake_trap_ops);
    bandwidth = 8 * MiB;
    began_us = g_get_monotonic_time();
    do {
        g_assert_true(test_ram_next(t));
        us = g_get_monotonic_time() - began_us;
        /* It may make up for a tenth of a second, and one run is the first */
        g_assert_cmpuint(t->saved * PAGE_SIZE, <=,
                         bandwidth * (us + 100000) / G_USEC_PER_SEC + 2 * MiB);
    } while (t->saved * PAGE_SIZE < 8 * MiB);

    /* An hour's pause, but not for these; of each, the neighbours come too */
    bandwidth = 1 * KiB;
    for (i = 0; i < 100; i++) {
        size_t before = t->saved;

        g_assert_true(fake_write(b->host + (8191 - i * 16) * PAGE_SIZE));
        g_assert_true(test_ram_next(t));
        g_assert_cmpuint(t->saved, ==, before + 16);
        g_assert_cmpuint(test_ram_stats(t).scan_pages, <, 8192 - 100 * 16);
    }

    /* It can be changed meanwhile, and then nothing is left of the pause */
    bandwidth = 1000 * MiB;
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 8192);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/next/order", test_order);
    g_test_add_func("/snapshot-ram/next/stop", test_stop);
    g_test_add_func("/snapshot-ram/next/room", test_room);
    g_test_add_func("/snapshot-ram/next/bandwidth", test_bandwidth);
    real_traps_add_test("/snapshot-ram/next", "contents", test_contents);
    real_traps_add_test("/snapshot-ram/next", "untouched", test_untouched);
    return g_test_run();
}

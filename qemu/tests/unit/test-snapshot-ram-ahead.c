/*
 * Unit tests for the RAM of a background snapshot: traps armed ahead
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Whatever is written while traps are armed, the image holds what the memory
 * does when that is complete; and from then on each write is stopped.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/memfd.h"
#include "qemu/mmap-alloc.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "fake-write-trap.h"
#include "memory-kinds.h"
#include "real-write-traps.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

#define NUM_PAGES (16 * KiB)

/* In different huge pages */
#define PAGE_A 6
#define PAGE_B 3001
#define PAGE_C 9001

static uint8_t *map_untouched(void)
{
    uint8_t *host = qemu_anon_ram_alloc(NUM_PAGES * PAGE_SIZE, NULL, false,
                                        true);

    g_assert_nonnull(host);
    /* Else the host may have more come into being than what is touched */
    madvise(host, NUM_PAGES * PAGE_SIZE, MADV_NOHUGEPAGE);
    /* Some traps need one page */
    memset(host, 1, PAGE_SIZE);
    return host;
}

static uint8_t *map_written(void)
{
    uint8_t *host = map_untouched();

    memset(host, 1, NUM_PAGES * PAGE_SIZE);
    return host;
}

static void unmap(uint8_t *host)
{
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

static TestRAM *begin(const WriteTrapOps *trap, uint8_t *host)
{
    TestRAM *t = test_ram_new(1024, true, LONG_MS);

    t->ram->config.arm_ahead = true;
    test_ram_add(t, host, NUM_PAGES, PAGE_SIZE, true);
    snapshot_ram_set_trap(t->ram, trap, &error_abort);
    return t;
}

/* What is untouched is not to be read in order to compare with it */
static void expect_page(TestRAM *t, size_t page)
{
    TestBlock *b = t->blocks[0];

    if (!b->expected) {
        b->expected = g_malloc0(b->num_pages * PAGE_SIZE);
    }
    memcpy(b->expected + page * PAGE_SIZE, b->host + page * PAGE_SIZE,
           PAGE_SIZE);
}

static void expect_all(TestRAM *t)
{
    size_t page;

    for (page = 0; page < t->blocks[0]->num_pages; page++) {
        expect_page(t, page);
    }
}

static void freeze(TestRAM *t)
{
    SnapshotBlock *b = &t->ram->blocks[0];

    snapshot_ram_arm(t->ram, &error_abort);
    /* As if nothing had been before */
    g_assert_cmpuint(t->ram->islands, ==, 0);
    g_assert_true(bitmap_empty(b->released, b->num_units));
    g_assert_true(bitmap_empty(b->claimed, b->num_units));
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 0);
}

static void save_and_free(TestRAM *t)
{
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
}

/* A write has no more let through than is around it, wherever others were */
static void test_write_alone(const void *trap)
{
    enum { LONE = NUM_PAGES / 4, MANY = NUM_PAGES / 2, AROUND = 16 };
    uint8_t *host = map_untouched();
    TestRAM *t;
    SnapshotBlock *b;
    size_t i;

    /* Nothing is beside the one, and much behind the other */
    memset(host + LONE * PAGE_SIZE, 1, AROUND * PAGE_SIZE);
    memset(host + MANY * PAGE_SIZE, 1, MANY * PAGE_SIZE);
    t = begin(trap, host);
    b = &t->ram->blocks[0];
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    for (i = 0; i < 3; i++) {
        qatomic_set(host + (LONE + i) * PAGE_SIZE, 2);
        qatomic_set(host + (MANY + i) * PAGE_SIZE, 2);
        g_assert_cmpuint(find_next_zero_bit(b->armed, NUM_PAGES,
                                            MANY + AROUND), ==, NUM_PAGES);
        snapshot_ram_arm_ahead(t->ram, &error_abort);
        g_assert_true(test_bit(MANY, b->armed));
    }
    test_ram_free(t);
    unmap(host);
}

/* Writes are let through, and stopped after the freeze */
static void test_write(const void *trap)
{
    uint8_t *host = map_written();
    TestRAM *t = begin(trap, host);

    snapshot_ram_arm_ahead(t->ram, &error_abort);
    qatomic_set(host + PAGE_A * PAGE_SIZE, 1);
    qatomic_set(host + PAGE_B * PAGE_SIZE, 2);
    qatomic_set(host + PAGE_B * PAGE_SIZE, 3);
    g_assert_cmpuint(test_ram_stats(t).let_through, ==, 2);
    expect_all(t);
    freeze(t);
    qatomic_set(host + PAGE_A * PAGE_SIZE, 4);
    qatomic_set(host + PAGE_B * PAGE_SIZE, 5);
    qatomic_set(host + PAGE_C * PAGE_SIZE, 6);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 3);
    g_assert_cmpuint(test_ram_stats(t).let_through, ==, 2);
    save_and_free(t);
    unmap(host);
}

/* What comes into being meanwhile is saved, and the rest not read */
static void test_appear(const void *trap)
{
    uint8_t *host = map_untouched();
    TestRAM *t;

    memset(host + PAGE_A * PAGE_SIZE, 1, PAGE_SIZE);
    t = begin(trap, host);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    memset(host + (PAGE_A + 1) * PAGE_SIZE, 2, PAGE_SIZE);
    memset(host + PAGE_B * PAGE_SIZE, 3, PAGE_SIZE);
    expect_page(t, 0);
    expect_page(t, PAGE_A);
    expect_page(t, PAGE_A + 1);
    expect_page(t, PAGE_B);
    freeze(t);
    qatomic_set(host + (PAGE_A + 1) * PAGE_SIZE, 4);
    qatomic_set(host + PAGE_B * PAGE_SIZE, 4);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 2);
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(test_ram_stats(t).untouched_pages, ==, NUM_PAGES - 4);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* What is discarded meanwhile is zero in the image */
static void test_discard(const void *trap)
{
    uint8_t *host = map_untouched();
    TestRAM *t;

    memset(host + PAGE_A * PAGE_SIZE, 1, PAGE_SIZE);
    memset(host + PAGE_B * PAGE_SIZE, 1, PAGE_SIZE);
    t = begin(trap, host);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    snapshot_ram_release(t->ram, host + PAGE_B * PAGE_SIZE, PAGE_SIZE);
    g_assert_cmpint(madvise(host + PAGE_B * PAGE_SIZE, PAGE_SIZE,
                            MADV_DONTNEED), ==, 0);
    expect_page(t, 0);
    expect_page(t, PAGE_A);
    freeze(t);
    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(test_ram_stats(t).untouched_pages, ==, NUM_PAGES - 2);
    test_ram_free(t);
    qemu_anon_ram_free(host, NUM_PAGES * PAGE_SIZE);
}

/* Until the freeze, what a system call was announced for stays as it is */
static void test_system_call(const void *opaque)
{
    const WriteTrapOps *trap = opaque;
    uint8_t *host = map_written();
    TestRAM *t = begin(trap, host);
    int fd = open("/dev/zero", O_RDONLY);

    g_assert_cmpint(fd, >=, 0);
    snapshot_ram_release(t->ram, host + PAGE_A * PAGE_SIZE, PAGE_SIZE);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    snapshot_ram_release(t->ram, host + PAGE_B * PAGE_SIZE, PAGE_SIZE);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    g_assert_cmpint(read(fd, host + PAGE_A * PAGE_SIZE, PAGE_SIZE), ==,
                    PAGE_SIZE);
    g_assert_cmpint(read(fd, host + PAGE_B * PAGE_SIZE, PAGE_SIZE), ==,
                    PAGE_SIZE);
    expect_all(t);
    freeze(t);
    if (trap->in_thread) {
        g_assert_cmpint(read(fd, host + PAGE_A * PAGE_SIZE, PAGE_SIZE), ==,
                        -1);
    }
    qatomic_set(host + PAGE_A * PAGE_SIZE, 1);
    qatomic_set(host + PAGE_B * PAGE_SIZE, 1);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 2);
    save_and_free(t);
    close(fd);
    unmap(host);
}

/* No huge page is split for a write that is let through */
static void test_huge(const void *trap)
{
    static const MemoryKind kind = {
        "anonymous-huge", MEMORY_ANONYMOUS, false, MEMORY_HUGE
    };
    HostPages *pages = host_pages_new(true, &error_abort);
    unsigned long huge = 0;
    size_t num_huge;
    Memory m;
    TestRAM *t;

    if (!host_pages_know_huge(pages)) {
        g_test_skip("The host does not tell which pages are huge");
    } else if (memory_map_or_skip(&m, &kind)) {
        num_huge = m.size / host_pages_huge_size();
        t = test_ram_new(1024, true, LONG_MS);
        t->ram->config.arm_ahead = true;
        test_ram_add(t, m.host, m.num_pages, PAGE_SIZE, true);
        snapshot_ram_set_trap(t->ram, trap, &error_abort);
        snapshot_ram_arm_ahead(t->ram, &error_abort);
        qatomic_set(m.host, 1);
        snapshot_ram_release(t->ram, m.host + 515 * PAGE_SIZE, PAGE_SIZE);
        expect_all(t);
        freeze(t);
        host_pages_find(pages, m.host, m.size, PAGE_SIZE, false, NULL, &huge,
                        &error_abort);
        g_assert_cmpuint(ctpopl(huge), ==, num_huge);
        save_and_free(t);
        memory_unmap(&m);
    }
    host_pages_free(pages);
}

/*
 * Many threads write, also to what does not exist yet, at all times.  Returns
 * how many writes were let through.
 */
static uint64_t run_contents(const WriteTrapOps *trap, uint8_t *host, int fd)
{
    TestRAM *t = test_ram_new(1024, true, LONG_MS);
    uint64_t let_through;
    TestScribblers *scribblers;

    t->ram->config.arm_ahead = true;
    test_ram_add_like(t, host, NUM_PAGES, (SnapshotBlockInfo) {
        .host_page_size = PAGE_SIZE,
        .writable = true,
        .shared = fd >= 0,
        .fd = fd,
    });
    snapshot_ram_set_trap(t->ram, trap, &error_abort);
    scribblers = test_scribblers_start(3, host, NUM_PAGES);
    test_scribblers_wait(scribblers);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    test_scribblers_stop(scribblers);
    let_through = test_ram_stats(t).let_through;

    /* What does not exist must not be read here */
    t->blocks[0]->expected = g_malloc0(NUM_PAGES * PAGE_SIZE);
    freeze(t);
    memcpy(t->blocks[0]->expected, host, NUM_PAGES * PAGE_SIZE);
    scribblers = test_scribblers_start(3, host, NUM_PAGES);
    while (!test_ram_stats(t).faults) {
        g_usleep(10);
    }
    test_ram_save(t, 0);
    test_scribblers_stop(scribblers);
    test_ram_check(t);
    test_ram_free(t);
    return let_through;
}

static void test_contents(const void *trap)
{
    uint64_t let_through = 0;
    int round;

    for (round = 0; round < 8; round++) {
        uint8_t *host = round % 2 ? map_untouched() : map_written();

        let_through += run_contents(trap, host, -1);
        unmap(host);
    }
    g_assert_cmpuint(let_through, >, 0);
}

static void test_contents_shared(const void *trap)
{
    static const MemoryKind kind = {
        "memfd", MEMORY_MEMFD, true, MEMORY_UNTOUCHED
    };
    int round;

    if (!real_trap_serves(trap, &kind)) {
        g_test_skip("The host cannot trap writes to shared memory");
        return;
    }
    for (round = 0; round < 4; round++) {
        int fd = qemu_memfd_create("ram", NUM_PAGES * PAGE_SIZE, false, 0, 0,
                                   &error_abort);
        uint8_t *host = qemu_ram_mmap(fd, NUM_PAGES * PAGE_SIZE, 2 * MiB,
                                      QEMU_MAP_SHARED, 0);

        g_assert_true(host != MAP_FAILED);
        memset(host, 1, NUM_PAGES * PAGE_SIZE / 2);
        run_contents(trap, host, fd);
        qemu_ram_munmap(fd, host, NUM_PAGES * PAGE_SIZE);
        close(fd);
    }
}

static void touch_a(void *host, size_t size)
{
    size_t offset = PAGE_A * PAGE_SIZE;

    if ((uint8_t *)host == fake_trap.start && size > offset) {
        ((uint8_t *)host)[offset] = 1;
    }
}

/* A page comes into being after it was looked for and before it is armed */
static void test_between(const void *trap)
{
    uint8_t *host = map_untouched();
    TestRAM *t;

    memset(host + PAGE_B * PAGE_SIZE, 1, PAGE_SIZE);
    fake_trap.arms_again = true;
    t = begin(trap, host);
    fake_trap.before_arm = touch_a;
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    fake_trap.before_arm = NULL;
    host[PAGE_A * PAGE_SIZE] = 1;
    expect_page(t, 0);
    expect_page(t, PAGE_A);
    expect_page(t, PAGE_B);
    freeze(t);
    g_assert_true(fake_armed(host + PAGE_A * PAGE_SIZE));
    save_and_free(t);
    unmap(host);
}

/* A thread can have late faults at one unit before and after the freeze */
static void test_late(void)
{
    uint8_t *host = map_written();
    uint8_t *late = host + PAGE_A * PAGE_SIZE;
    TestRAM *t = begin(&fake_trap_ops, host);

    fake_trap.arms_again = true;
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    g_assert_true(snapshot_ram_fault(late, t->ram));
    g_assert_false(fake_armed(late));
    /* It was on its way; but the next one has another reason */
    g_assert_true(snapshot_ram_fault(late, t->ram));
    g_assert_false(snapshot_ram_fault(late, t->ram));
    expect_all(t);
    snapshot_ram_arm(t->ram, &error_abort);
    g_assert_true(fake_armed(late));
    snapshot_ram_release(t->ram, late, PAGE_SIZE);
    g_assert_true(snapshot_ram_fault(late, t->ram));
    g_assert_false(snapshot_ram_fault(late, t->ram));
    save_and_free(t);
    unmap(host);
}

/* There are not more islands than the trap can bear, before nor after */
static void test_islands(void)
{
    uint8_t *host = map_written();
    TestRAM *t;
    size_t page;

    fake_trap.max_islands = 10;
    fake_trap.arms_again = true;
    t = begin(&fake_trap_ops, host);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    for (page = 0; page < NUM_PAGES; page += 100) {
        size_t scattered = page * 37 % NUM_PAGES;

        g_assert_true(fake_write(host + scattered * PAGE_SIZE));
    }
    g_assert_cmpuint(fake_trap.peak_islands, <=, 11);
    g_assert_cmpuint(fake_trap.peak_islands, >, 5);
    expect_all(t);
    freeze(t);
    g_assert_cmpuint(fake_trap.num_armed, ==, NUM_PAGES);
    save_and_free(t);
    unmap(host);
}

/* The freeze arms but what was written, neighbours with one call */
static void test_ranges(void)
{
    uint8_t *host = map_written();
    TestRAM *t = begin(&fake_trap_ops, host);
    bool again;
    int arms;

    fake_trap.arms_again = true;
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    g_assert_cmpuint(fake_trap.num_armed, ==, NUM_PAGES);
    /* Two that are neighbours, and one that is not */
    g_assert_true(fake_write(host + PAGE_A * PAGE_SIZE));
    g_assert_true(fake_write(host + (PAGE_A + 16) * PAGE_SIZE));
    g_assert_true(fake_write(host + PAGE_B * PAGE_SIZE));
    g_assert_cmpuint(fake_trap.num_armed, ==, NUM_PAGES - 3 * 16);
    expect_all(t);
    arms = fake_trap.arms;
    freeze(t);
    g_assert_cmpint(fake_trap.arms, ==, arms + 2);
    /* Too late, also for who has not seen it yet */
    g_assert_false(snapshot_ram_let_through(t->ram, &t->ram->blocks[0], PAGE_A,
                                            PAGE_A + 1, true, &again));
    g_assert_cmpuint(fake_trap.num_armed, ==, NUM_PAGES);
    save_and_free(t);
    unmap(host);
}

/* What is not armed ahead is in the freeze */
static void test_others(void)
{
    uint8_t *host = map_written();
    TestRAM *t = test_ram_new(1024, true, LONG_MS);
    int fd = open("/dev/zero", O_RDONLY);

    g_assert_cmpint(fd, >=, 0);
    t->ram->config.arm_ahead = true;
    /* A small one, one of a file, one that needs no trap */
    test_ram_add(t, host, 256, PAGE_SIZE, true);
    test_ram_add_like(t, host + 4 * MiB, 1024, (SnapshotBlockInfo) {
        .host_page_size = PAGE_SIZE,
        .writable = true,
        .fd = fd,
    });
    test_ram_add(t, host + 12 * MiB, 1024, PAGE_SIZE, false);
    snapshot_ram_set_trap(t->ram, &fake_trap_existing_ops, &error_abort);
    snapshot_ram_arm_ahead(t->ram, &error_abort);
    snapshot_ram_release(t->ram, host, PAGE_SIZE);
    snapshot_ram_release(t->ram, host + 12 * MiB, PAGE_SIZE);
    g_assert_cmpint(fake_trap.arms, ==, 0);
    snapshot_ram_arm(t->ram, &error_abort);
    g_assert_cmpuint(fake_trap.num_armed, ==, 256 + 1024);
    test_ram_free(t);
    close(fd);
    unmap(host);
}

static void test_fails(void)
{
    uint8_t *host = map_written();
    TestRAM *t = begin(&fake_trap_ops, host);
    Error *err = NULL;

    fake_trap.fail_arm = 2;
    g_assert_false(snapshot_ram_arm_ahead(t->ram, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "'block0'"));
    error_free_or_abort(&err);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_false(snapshot_ram_arm(t->ram, &err));
    error_free_or_abort(&err);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    test_ram_free(t);
    unmap(host);
}

static void *stop_thread(void *opaque)
{
    TestRAM *t = opaque;

    while (!qatomic_read(&fake_trap.arms)) {
        g_usleep(1);
    }
    snapshot_ram_stop(t->ram);
    return NULL;
}

/* As when the user cancels: nothing stays armed, and nothing is armed later */
static void test_stop(void)
{
    uint8_t *host = map_written();
    int round;

    for (round = 0; round < 100; round++) {
        TestRAM *t = begin(&fake_trap_ops, host);
        QemuThread thread;

        fake_trap.arms_again = true;
        qemu_thread_create(&thread, "stop", stop_thread, t,
                           QEMU_THREAD_JOINABLE);
        snapshot_ram_arm_ahead(t->ram, NULL);
        qemu_thread_join(&thread);
        g_assert_cmpuint(fake_trap.num_armed, ==, 0);
        g_assert_false(snapshot_ram_arm_ahead(t->ram, NULL));
        g_assert_false(snapshot_ram_arm(t->ram, NULL));
        g_assert_cmpuint(fake_trap.num_armed, ==, 0);
        test_ram_free(t);
    }
    unmap(host);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_data_func("/snapshot-ram/ahead/between/all", &fake_trap_ops,
                         test_between);
    g_test_add_data_func("/snapshot-ram/ahead/between/existing",
                         &fake_trap_existing_ops, test_between);
    g_test_add_func("/snapshot-ram/ahead/late", test_late);
    g_test_add_func("/snapshot-ram/ahead/islands", test_islands);
    g_test_add_func("/snapshot-ram/ahead/ranges", test_ranges);
    g_test_add_func("/snapshot-ram/ahead/others", test_others);
    g_test_add_func("/snapshot-ram/ahead/fails", test_fails);
    g_test_add_func("/snapshot-ram/ahead/stop", test_stop);
    real_traps_add_test("/snapshot-ram/ahead", "write", test_write);
    real_traps_add_test("/snapshot-ram/ahead", "write-alone",
                        test_write_alone);
    real_traps_add_test("/snapshot-ram/ahead", "appear", test_appear);
    real_traps_add_test("/snapshot-ram/ahead", "discard", test_discard);
    real_traps_add_test("/snapshot-ram/ahead", "system-call", test_system_call);
    real_traps_add_test("/snapshot-ram/ahead", "huge", test_huge);
    real_traps_add_test("/snapshot-ram/ahead", "contents", test_contents);
    real_traps_add_test("/snapshot-ram/ahead", "contents-shared",
                        test_contents_shared);
    return g_test_run();
}

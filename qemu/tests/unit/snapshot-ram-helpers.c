/*
 * RAM that unit tests take a snapshot of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/madvise.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

uint8_t *test_map(size_t num_pages)
{
    uint8_t *host = qemu_anon_ram_alloc(num_pages * PAGE_SIZE, NULL, false,
                                        true);
    size_t i, j;

    g_assert_nonnull(host);
    qemu_madvise(host, num_pages * PAGE_SIZE, QEMU_MADV_NOHUGEPAGE);
    for (i = 0; i < num_pages; i++) {
        uint64_t *words = (uint64_t *)(host + i * PAGE_SIZE);

        for (j = 0; j < PAGE_SIZE / sizeof(*words) && i % 5; j++) {
            words[j] = i * PAGE_SIZE + j + 1;
        }
    }
    return host;
}

void test_unmap(uint8_t *host, size_t num_pages)
{
    qemu_anon_ram_free(host, num_pages * PAGE_SIZE);
}

__thread bool test_is_urgent;

static bool test_urgent(void)
{
    return test_is_urgent;
}

TestRAM *test_ram_new(size_t num_slots, bool detect_zero, int stall_limit_ms)
{
    return test_ram_new_busy(num_slots, detect_zero, INT64_MAX,
                             stall_limit_ms);
}

TestRAM *test_ram_new_busy(size_t num_slots, bool detect_zero, int64_t busy_ns,
                           int stall_limit_ms)
{
    TestRAM *t = g_new0(TestRAM, 1);

    t->ram = snapshot_ram_new(&(SnapshotRAMConfig) {
        .buffer_size = num_slots * PAGE_SIZE,
        .page_size = PAGE_SIZE,
        .detect_zero = detect_zero,
        .busy_ns = busy_ns,
        .stall_limit_ms = stall_limit_ms,
        .urgent = test_urgent,
        .urgent_limit_ms = TEST_URGENT_LIMIT_MS,
        .urgent_call_ms = stall_limit_ms,
    }, &error_abort);
    t->buffer = t->ram->buffer;
    return t;
}

TestBlock *test_ram_add(TestRAM *t, uint8_t *host, size_t num_pages,
                        size_t host_page_size, bool writable)
{
    return test_ram_add_like(t, host, num_pages, (SnapshotBlockInfo) {
        .host_page_size = host_page_size,
        .writable = writable,
        .fd = -1,
    });
}

TestBlock *test_ram_add_like(TestRAM *t, uint8_t *host, size_t num_pages,
                             SnapshotBlockInfo like)
{
    TestBlock *b = g_new0(TestBlock, 1);

    b->host = host;
    b->num_pages = num_pages;
    b->save = bitmap_new(num_pages);
    bitmap_set(b->save, 0, num_pages);
    b->seen = g_new0(uint8_t, num_pages);
    g_assert_cmpuint(t->num_blocks, <, ARRAY_SIZE(t->blocks));
    snprintf(b->name, sizeof(b->name), "block%zu", t->num_blocks);
    t->blocks[t->num_blocks++] = b;

    like.owner = b;
    like.name = b->name;
    like.host = host;
    like.size = num_pages * PAGE_SIZE;
    like.save = b->save;
    snapshot_ram_add_block(t->ram, &like, &error_abort);
    return b;
}

void test_ram_arm(TestRAM *t, const WriteTrapOps *trap)
{
    size_t i;

    snapshot_ram_set_trap(t->ram, trap, &error_abort);
    for (i = 0; i < t->num_blocks; i++) {
        TestBlock *b = t->blocks[i];

        b->expected = g_memdup2(b->host, b->num_pages * PAGE_SIZE);
    }
    snapshot_ram_arm(t->ram, &error_abort);
}

/* A page came out; @data is NULL if it is said to be all zeroes */
static void check_page(TestRAM *t, TestBlock *b, uint64_t offset,
                       const uint8_t *data)
{
    size_t page = offset / PAGE_SIZE;
    uint8_t *expected = b->expected + offset;

    g_assert_cmpuint(offset % PAGE_SIZE, ==, 0);
    g_assert_cmpuint(page, <, b->num_pages);
    g_assert_true(test_bit(page, b->save));
    g_assert_cmpuint(b->seen[page]++, ==, 0);
    if (data) {
        g_assert_cmpint(memcmp(data, expected, PAGE_SIZE), ==, 0);
    } else {
        g_assert_true(buffer_is_zero(expected, PAGE_SIZE));
        t->saved_zero++;
    }
    t->saved++;
}

size_t test_ram_take(TestRAM *t, const SnapshotPage *pages, size_t n)
{
    uint64_t page;
    size_t i;

    for (i = 0; i < n; i++) {
        for (page = 0; page < pages[i].num_pages; page++) {
            check_page(t, pages[i].owner, pages[i].offset + page * PAGE_SIZE,
                       pages[i].data);
        }
    }
    snapshot_ram_written(t->ram, pages, n);
    return n;
}

size_t test_ram_drain(TestRAM *t)
{
    uint32_t slots[64];
    SnapshotPage pages[ARRAY_SIZE(slots)];
    size_t n = page_buffer_dequeue(t->buffer, slots, ARRAY_SIZE(slots),
                                   false);

    snapshot_ram_fill_pages(t->ram, pages, slots, n);
    return test_ram_take(t, pages, n);
}

bool test_ram_scan(TestRAM *t)
{
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    size_t i, n;

    if (!snapshot_ram_scan(t->ram, pages, &n)) {
        return false;
    }
    for (i = 0; i < n; i++) {
        page_buffer_queue(t->buffer, &pages[i].slot, 1);
    }
    return true;
}

bool test_ram_next(TestRAM *t)
{
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];

    return test_ram_take(t, pages, snapshot_ram_next(t->ram, pages));
}

void test_ram_save(TestRAM *t, int pause_us)
{
    while (test_ram_next(t)) {
        if (pause_us) {
            g_usleep(pause_us);
        }
        g_assert_null(snapshot_ram_failure(t->ram));
    }
    g_assert_true(snapshot_ram_is_saved(t->ram));
}

void test_ram_check(TestRAM *t)
{
    size_t i, page;

    for (i = 0; i < t->num_blocks; i++) {
        TestBlock *b = t->blocks[i];

        for (page = 0; page < b->num_pages; page++) {
            g_assert_cmpuint(b->seen[page], ==, test_bit(page, b->save));
        }
    }
}

void test_ram_free(TestRAM *t)
{
    size_t i;

    snapshot_ram_stop(t->ram);
    snapshot_ram_free(t->ram);
    for (i = 0; i < t->num_blocks; i++) {
        g_free(t->blocks[i]->save);
        g_free(t->blocks[i]->expected);
        g_free(t->blocks[i]->seen);
        g_free(t->blocks[i]);
    }
    g_free(t);
}

SnapshotRAMStats test_ram_stats(TestRAM *t)
{
    SnapshotRAMStats stats;

    snapshot_ram_get_stats(t->ram, &stats);
    return stats;
}

uint64_t test_ram_stalls(const SnapshotRAMStats *stats)
{
    uint64_t stalls = 0;
    size_t i;

    for (i = 0; i < SNAPSHOT_RAM_STALL_LENGTHS; i++) {
        stalls += stats->stalls[i];
    }
    return stalls;
}

typedef struct Scribbler {
    QemuThread thread;
    uint8_t *host;
    size_t num_pages;
    GRand *rand;
    uint64_t writes;
    bool stop;
} Scribbler;

struct TestScribblers {
    size_t n;
    Scribbler scribblers[];
};

static void *scribble_thread(void *opaque)
{
    Scribbler *s = opaque;
    uint64_t writes = 0;

    while (!qatomic_read(&s->stop)) {
        uint64_t *word = (uint64_t *)s->host +
                         g_rand_int(s->rand) % (s->num_pages * PAGE_SIZE / 8);

        qatomic_set(word, ++writes);
        qatomic_set(&s->writes, writes);
    }
    return NULL;
}

TestScribblers *test_scribblers_start(size_t n, uint8_t *host, size_t num_pages)
{
    TestScribblers *all = g_malloc0(sizeof(*all) + n * sizeof(Scribbler));
    size_t i;

    all->n = n;
    for (i = 0; i < n; i++) {
        Scribbler *s = &all->scribblers[i];

        s->host = host;
        s->num_pages = num_pages;
        s->rand = g_rand_new_with_seed(g_test_rand_int());
        qemu_thread_create(&s->thread, "scribbler", scribble_thread, s,
                           QEMU_THREAD_JOINABLE);
    }
    return all;
}

void test_scribblers_wait(TestScribblers *all)
{
    size_t i;

    for (i = 0; i < all->n; i++) {
        while (!qatomic_read(&all->scribblers[i].writes)) {
            g_usleep(10);
        }
    }
}

uint64_t test_scribblers_stop(TestScribblers *all)
{
    uint64_t writes = 0;
    size_t i;

    for (i = 0; i < all->n; i++) {
        qatomic_set(&all->scribblers[i].stop, true);
        qemu_thread_join(&all->scribblers[i].thread);
        g_rand_free(all->scribblers[i].rand);
        writes += all->scribblers[i].writes;
    }
    g_free(all);
    return writes;
}

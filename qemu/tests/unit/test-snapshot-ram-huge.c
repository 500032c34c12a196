/*
 * Unit tests for the RAM of a background snapshot: huge pages
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * With each trap that is real, on memory in transparent huge pages.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/thread.h"
#include "../migration/host-pages.h"
#include "memory-kinds.h"
#include "real-write-traps.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

#define LONG_MS 60000

static const MemoryKind huge_kind = {
    "anonymous-huge", MEMORY_ANONYMOUS, false, MEMORY_HUGE
};

typedef struct Snapshot {
    Memory m;
    TestRAM *t;
    size_t num_huge;
    /* See num_splits(); before memory was mended */
    uint64_t splits;
} Snapshot;

static size_t count_huge(const Memory *m)
{
    HostPages *pages = host_pages_new(true, &error_abort);
    g_autofree unsigned long *exist = bitmap_new(m->num_pages);
    unsigned long huge = 0;

    host_pages_find(pages, m->host, m->size, m->page_size, false, exist, &huge,
                    &error_abort);
    host_pages_free(pages);
    return ctpopl(huge);
}

static bool host_tells_huge(void)
{
    HostPages *pages = host_pages_new(true, NULL);
    bool tells = pages && host_pages_know_huge(pages);

    if (pages) {
        host_pages_free(pages);
    }
    return tells;
}

/* Returns false if this host cannot, and skips the test */
static bool begin(Snapshot *s, const void *ops, size_t num_slots)
{
    if (!host_pages_can_collapse() || !host_tells_huge()) {
        g_test_skip("The host cannot collapse memory into huge pages, or does "
                    "not tell which are");
        return false;
    }
    if (!memory_map_or_skip(&s->m, &huge_kind)) {
        return false;
    }
    s->num_huge = s->m.size / host_pages_huge_size();
    s->t = test_ram_new(num_slots, true, LONG_MS);
    test_ram_add(s->t, s->m.host, s->m.num_pages, PAGE_SIZE, true);
    test_ram_arm(s->t, ops);
    g_assert_cmpuint(count_huge(&s->m), ==, s->num_huge);
    return true;
}

/* Huge pages that the host has split so far, of whomever */
static uint64_t num_splits(void)
{
    static const char *const names[] = { "thp_split_page ", "thp_split_pmd " };
    g_autofree char *text = NULL;
    uint64_t sum = 0;
    size_t i;

    g_assert_true(g_file_get_contents("/proc/vmstat", &text, NULL, NULL));
    for (i = 0; i < ARRAY_SIZE(names); i++) {
        const char *line = strstr(text, names[i]);

        g_assert_nonnull(line);
        sum += g_ascii_strtoull(line + strlen(names[i]), NULL, 10);
    }
    return sum;
}

/*
 * Is all of it huge?  Otherwise skips the test, if the host is why: it may have
 * no huge page to give, or have split one in order to move it.
 */
static bool is_mended(Snapshot *s, const SnapshotRAM *ram)
{
    const SnapshotBlock *b = &ram->blocks[0];

    if (count_huge(&s->m) == s->num_huge) {
        return true;
    }
    g_assert_true(num_splits() != s->splits ||
                  find_first_bit(b->failed, b->num_huge) < b->num_huge);
    g_test_skip("The host could not make a huge page, or has split one");
    return false;
}

static void end(Snapshot *s)
{
    snapshot_ram_stop(s->t->ram);
    test_ram_free(s->t);
    memory_unmap(&s->m);
}

static void write_page(Snapshot *s, size_t page)
{
    qatomic_set(s->m.host + page * PAGE_SIZE, 0xff);
}

/*
 * A trap's thread takes note of a split after it has let the writer go on, and
 * of when that was last of all; nothing is mended at that time
 */
static void wait_split(Snapshot *s, uint64_t huge_split)
{
    int tries;

    for (tries = 0; tries < 1000; tries++) {
        SnapshotRAMStats stats = test_ram_stats(s->t);

        if (stats.huge_split == huge_split &&
            test_ram_stalls(&stats) == stats.faults) {
            break;
        }
        g_usleep(1000);
    }
    g_assert_cmpuint(test_ram_stats(s->t).huge_split, ==, huge_split);
}

/* What nobody writes is never split, however small the scanner's share */
static void test_scan(const void *ops)
{
    size_t left;
    Snapshot s;

    /* Half of the slots, which is what the scanner gets, are a huge page */
    if (!begin(&s, ops, 1024)) {
        return;
    }
    for (left = s.num_huge; left; left--) {
        g_assert_true(test_ram_scan(s.t));
        g_assert_false(test_ram_scan(s.t));
        /* A little room is not enough for it */
        g_assert_cmpuint(test_ram_drain(s.t), ==, 64);
        g_assert_cmpint(test_ram_scan(s.t), ==, false);
        while (test_ram_drain(s.t)) {
            ;
        }
        g_assert_cmpuint(count_huge(&s.m), ==, s.num_huge);
    }
    test_ram_save(s.t, 0);
    test_ram_check(s.t);
    g_assert_cmpuint(test_ram_stats(s.t).huge_split, ==, 0);
    g_assert_false(snapshot_ram_mend(s.t->ram));
    end(&s);
}

/* What a write splits is saved as a whole and mended while others are armed */
static void test_mend(const void *ops)
{
    Snapshot s;

    if (!begin(&s, ops, 2048)) {
        return;
    }
    write_page(&s, 600);
    wait_split(&s, 1);
    g_assert_cmpuint(count_huge(&s.m), ==, s.num_huge - 1);
    write_page(&s, 700);
    g_assert_cmpuint(test_ram_stats(s.t).huge_split, ==, 1);

    s.splits = num_splits();
    g_assert_true(snapshot_ram_mend(s.t->ram));
    g_assert_false(snapshot_ram_mend(s.t->ram));
    if (!is_mended(&s, s.t->ram)) {
        end(&s);
        return;
    }
    g_assert_cmpuint(test_ram_stats(s.t).huge_mended, ==, 1);
    g_assert_cmpuint(test_ram_stats(s.t).scan_pages +
                     test_ram_stats(s.t).fault_pages, ==, 512);
    g_assert_cmpuint(test_ram_stats(s.t).faults, ==, 2);
    /* Nobody is stopped there any more, but elsewhere */
    write_page(&s, 800);
    g_assert_cmpuint(test_ram_stats(s.t).faults, ==, 2);
    write_page(&s, 100);
    g_assert_cmpuint(test_ram_stats(s.t).faults, ==, 3);

    test_ram_save(s.t, 0);
    test_ram_check(s.t);
    end(&s);
}

/*
 * While the guest's writes are stopped and the image is being written, the
 * scanner saves the rest, before all else, and the host is left alone
 */
static void test_busy(const void *ops)
{
    Snapshot s;

    if (!begin(&s, ops, 2048)) {
        return;
    }
    s.t->ram->config.quiet_ns = INT64_MAX;
    s.t->ram->config.stuck_ns = INT64_MAX;
    write_page(&s, 600);
    wait_split(&s, 1);
    g_assert_false(snapshot_ram_mend(s.t->ram));
    g_assert_cmpuint(test_ram_stats(s.t).scan_pages, ==, 0);

    while (test_ram_drain(s.t)) {
        ;
    }
    /* What lies before the write, and what lies behind it */
    g_assert_true(test_ram_next(s.t));
    g_assert_true(test_ram_next(s.t));
    write_page(&s, 520);
    write_page(&s, 1000);
    g_assert_cmpuint(test_ram_stats(s.t).faults, ==, 1);
    g_assert_false(snapshot_ram_mend(s.t->ram));
    g_assert_cmpuint(count_huge(&s.m), ==, s.num_huge - 1);

    test_ram_save(s.t, 0);
    test_ram_check(s.t);
    snapshot_ram_stop(s.t->ram);
    s.splits = num_splits();
    g_assert_true(snapshot_ram_mend(s.t->ram));
    is_mended(&s, s.t->ram);
    end(&s);
}

/* Without room in the buffer, it is mended when the scanner has been there */
static void test_mend_later(const void *ops)
{
    g_autofree uint32_t *held = g_new(uint32_t, 1900);
    bool waited = false;
    Snapshot s;

    if (!begin(&s, ops, 2048)) {
        return;
    }
    g_assert_cmpuint(page_buffer_take(s.t->buffer, held, 1900, 1900, true, 0,
                                      &waited), ==, 1900);
    write_page(&s, 600);
    wait_split(&s, 1);
    g_assert_false(snapshot_ram_mend(s.t->ram));
    g_assert_cmpuint(count_huge(&s.m), ==, s.num_huge - 1);
    page_buffer_give(s.t->buffer, held, 1900);

    test_ram_save(s.t, 0);
    test_ram_check(s.t);
    s.splits = num_splits();
    g_assert_true(snapshot_ram_mend(s.t->ram));
    is_mended(&s, s.t->ram);
    end(&s);
}

/* After the snapshot, also one that failed; and by the next one */
static void test_mend_rest(const void *ops)
{
    Snapshot s;
    TestRAM *next;
    bool mended;

    if (!begin(&s, ops, 2048)) {
        return;
    }
    write_page(&s, 600);
    wait_split(&s, 1);
    snapshot_ram_stop(s.t->ram);
    g_assert_false(snapshot_ram_mend_wait(s.t->ram));
    snapshot_ram_close(s.t->ram);
    g_assert_cmpuint(snapshot_ram_mend_rest(s.t->ram), ==, 1);

    next = test_ram_new(2048, true, LONG_MS);
    test_ram_add(next, s.m.host, s.m.num_pages, PAGE_SIZE, true);
    test_ram_arm(next, ops);
    g_assert_false(snapshot_ram_mend(next->ram));
    snapshot_ram_inherit(next->ram, s.t->ram);
    s.splits = num_splits();
    g_assert_true(snapshot_ram_mend(next->ram));
    mended = is_mended(&s, next->ram);
    test_ram_save(next, 0);
    test_ram_check(next);
    test_ram_free(next);

    if (mended) {
        /* It is huge already, which is as good */
        g_assert_true(snapshot_ram_mend(s.t->ram));
        g_assert_cmpuint(snapshot_ram_mend_rest(s.t->ram), ==, 0);
    }
    end(&s);
}

/* What was discarded does not come back by being mended */
static void test_discarded(const void *ops)
{
    size_t before;
    Snapshot s;

    if (!begin(&s, ops, 2048)) {
        return;
    }
    snapshot_ram_release(s.t->ram, s.m.host + 600 * PAGE_SIZE, 8 * PAGE_SIZE);
    madvise(s.m.host + 600 * PAGE_SIZE, 8 * PAGE_SIZE, MADV_DONTNEED);
    before = memory_allocated(&s.m);
    while (snapshot_ram_mend(s.t->ram)) {
        ;
    }
    test_ram_save(s.t, 0);
    test_ram_check(s.t);
    snapshot_ram_stop(s.t->ram);
    snapshot_ram_close(s.t->ram);
    snapshot_ram_mend_rest(s.t->ram);
    while (snapshot_ram_mend(s.t->ram)) {
        ;
    }
    g_assert_cmpuint(memory_allocated(&s.m), ==, before);
    g_assert_cmpuint(count_huge(&s.m), ==, s.num_huge - 1);
    end(&s);
}

typedef struct Helper {
    QemuThread thread;
    Snapshot *s;
    bool stop;
} Helper;

static void *mend_thread(void *opaque)
{
    Helper *h = opaque;

    do {
        while (snapshot_ram_mend(h->s->t->ram)) {
            ;
        }
    } while (snapshot_ram_mend_wait(h->s->t->ram));
    return NULL;
}

static void *write_thread(void *opaque)
{
    Helper *h = opaque;
    size_t page;

    /* In order, as the scanner goes, so that they often meet */
    for (page = 0; !qatomic_read(&h->stop); page++) {
        write_page(h->s, page % h->s->m.num_pages);
    }
    return NULL;
}

/* Scanner, mender and writers are after the same pages all the time */
static void test_threads(const void *ops)
{
    Helper helpers[3];
    Snapshot s;
    int round;
    size_t i;

    for (round = 0; round < 50; round++) {
        if (!begin(&s, ops, 64)) {
            return;
        }
        for (i = 0; i < ARRAY_SIZE(helpers); i++) {
            helpers[i].s = &s;
            helpers[i].stop = false;
            qemu_thread_create(&helpers[i].thread, "helper",
                               i ? write_thread : mend_thread, &helpers[i],
                               QEMU_THREAD_JOINABLE);
        }
        test_ram_save(s.t, 0);
        test_ram_check(s.t);
        snapshot_ram_stop(s.t->ram);
        for (i = 0; i < ARRAY_SIZE(helpers); i++) {
            qatomic_set(&helpers[i].stop, true);
            qemu_thread_join(&helpers[i].thread);
        }
        /* What could not be mended before, and what came after it */
        snapshot_ram_close(s.t->ram);
        snapshot_ram_mend_rest(s.t->ram);
        s.splits = num_splits();
        while (snapshot_ram_mend(s.t->ram)) {
            ;
        }
        is_mended(&s, s.t->ram);
        end(&s);
    }
}

static const struct {
    const char *name;
    GTestDataFunc fn;
} cases[] = {
    { "scan", test_scan },
    { "mend", test_mend },
    { "busy", test_busy },
    { "mend-later", test_mend_later },
    { "mend-rest", test_mend_rest },
    { "discarded", test_discarded },
    { "threads", test_threads },
};

int main(int argc, char **argv)
{
    size_t i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        real_traps_add_test("/snapshot-ram/huge", cases[i].name, cases[i].fn);
    }
    return g_test_run();
}

/*
 * Unit tests for the RAM of a background snapshot: many threads
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "fake-write-trap.h"
#include "real-write-traps.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-helpers.h"

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

/* A thread that writes to one page, under the fake trap */
typedef struct Writer {
    QemuThread thread;
    uint8_t *host;
    bool done;
} Writer;

static void *writer_thread(void *opaque)
{
    Writer *w = opaque;

    g_assert_true(fake_write(w->host));
    qatomic_set(&w->done, true);
    return NULL;
}

static Writer *writer_new(uint8_t *host)
{
    Writer *w = g_new0(Writer, 1);

    w->host = host;
    qemu_thread_create(&w->thread, "writer", writer_thread, w,
                       QEMU_THREAD_JOINABLE);
    return w;
}

static void assert_waits(Writer *w)
{
    g_usleep(30 * 1000);
    g_assert_false(qatomic_read(&w->done));
}

static void writer_join(Writer *w)
{
    qemu_thread_join(&w->thread);
    g_free(w);
}

static struct {
    bool entered;
    bool leave;
} gate;

static void gate_release(void *host, size_t size)
{
    qatomic_set(&gate.entered, true);
    while (!qatomic_read(&gate.leave)) {
        g_usleep(100);
    }
}

/* Starts a thread that has claimed and copied its page, but not released it */
static Writer *writer_new_at_gate(uint8_t *host)
{
    Writer *w;

    gate.entered = false;
    gate.leave = false;
    fake_trap.before_release = gate_release;
    w = writer_new(host);
    while (!qatomic_read(&gate.entered)) {
        g_usleep(100);
    }
    return w;
}

static void test_claims(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    Writer *one, *other;

    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);

    /* Who comes second waits for the first, and for nobody else */
    one = writer_new_at_gate(host + 20 * PAGE_SIZE);
    other = writer_new(host + 21 * PAGE_SIZE);
    while (test_ram_stats(t).faults < 2) {
        g_usleep(100);
    }
    assert_waits(other);
    assert_waits(one);
    /* The scanner goes by */
    fake_trap.before_release = NULL;
    while (test_ram_scan(t)) {
        ;
    }
    assert_waits(other);

    qatomic_set(&gate.leave, true);
    writer_join(one);
    writer_join(other);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, 2);
    g_assert_cmpuint(test_ram_stats(t).fault_pages, ==, 16);

    test_ram_save(t, 0);
    test_ram_check(t);
    g_assert_cmpuint(fake_trap.twice, ==, 0);
    test_ram_free(t);
    test_unmap(host, 100);
}

/* Of 32 slots, those that are for anybody; one is for the urgent */
#define FULL 31

/* Take pages through faults until a buffer of 32 slots is full */
static size_t fill_buffer(TestRAM *t, uint8_t *host)
{
    size_t page = 0;

    while (test_ram_stats(t).fault_pages < FULL) {
        g_assert_true(fake_write(host + page++ * PAGE_SIZE));
    }
    g_assert_cmpuint(test_ram_stats(t).waits, ==, 0);
    return page;
}

static void test_back_pressure(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(32, true, LONG_MS);
    SnapshotRAMStats stats;
    uint64_t faults;
    size_t page;
    int64_t start;
    Writer *w;
    int length;

    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    start = g_get_monotonic_time();
    page = fill_buffer(t, host);
    faults = test_ram_stats(t).faults;
    w = writer_new(host + page * PAGE_SIZE);
    while (test_ram_stats(t).faults == faults) {
        g_usleep(100);
    }
    assert_waits(w);
    g_assert_cmpuint(test_ram_stats(t).buffer_used, ==, FULL);
    g_assert_cmpuint(test_ram_drain(t), ==, FULL);
    writer_join(w);
    stats = test_ram_stats(t);
    g_assert_cmpuint(stats.waits, ==, 1);
    g_assert_null(snapshot_ram_failure(t->ram));

    /* One of them took longer than the others, but not than all of this */
    g_assert_cmpuint(test_ram_stalls(&stats), ==, faults + 1);
    g_assert_cmpuint(stats.longest_stall_ns, >=, SCALE_MS);
    g_assert_cmpuint(stats.longest_stall_ns, <=, stats.stall_ns);
    g_assert_cmpuint(stats.stall_ns, <=,
                     (g_get_monotonic_time() - start + 1) * SCALE_US);
    length = 64 - clz64(stats.longest_stall_ns / SCALE_US);
    g_assert_cmpuint(stats.stalls[length], >, 0);

    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 100);
}

static void test_stall_limit(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(32, true, 100);
    int64_t start;
    Writer *w;

    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    start = g_get_monotonic_time();
    w = writer_new(host + fill_buffer(t, host) * PAGE_SIZE);
    writer_join(w);
    g_assert_cmpint(g_get_monotonic_time() - start, >=, 95 * 1000);

    /* It went on, and so do all others, at once */
    g_assert_nonnull(strstr(snapshot_ram_failure(t->ram), "waited too long"));
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_false(test_ram_next(t));
    g_assert_false(snapshot_ram_is_saved(t->ram));
    test_ram_free(t);
    test_unmap(host, 100);
}

/* All that hold what others need wait for so long together, and no longer */
static void test_urgent_limit(void)
{
    uint8_t *host = test_map(200);
    TestRAM *t = test_ram_new(32, true, LONG_MS);
    int64_t start;
    Writer *w;

    test_ram_add(t, host, 200, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    w = writer_new(host + fill_buffer(t, host) * PAGE_SIZE);
    assert_waits(w);

    /* There is one left for them */
    test_is_urgent = true;
    g_assert_true(fake_write(host + 100 * PAGE_SIZE));
    g_assert_null(snapshot_ram_failure(t->ram));

    start = g_get_monotonic_time();
    snapshot_ram_release(t->ram, host + 110 * PAGE_SIZE, 64 * PAGE_SIZE);
    g_assert_cmpint(g_get_monotonic_time() - start, >=,
                    (TEST_URGENT_LIMIT_MS - 20) * 1000);
    g_assert_nonnull(strstr(snapshot_ram_failure(t->ram), "QEMU itself"));
    test_is_urgent = false;
    writer_join(w);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    test_ram_free(t);
    test_unmap(host, 200);
}

typedef struct Trickle {
    QemuThread thread;
    TestRAM *t;
    bool stop;
} Trickle;

/* A destination that takes a page now and then */
static void *trickle_thread(void *opaque)
{
    Trickle *trickle = opaque;
    uint32_t slot;

    while (!qatomic_read(&trickle->stop)) {
        if (page_buffer_dequeue(trickle->t->buffer, &slot, 1, false)) {
            page_buffer_give(trickle->t->buffer, &slot, 1);
        }
        g_usleep(10 * 1000);
    }
    return NULL;
}

/* One deadline for a call, or for many calls, and not for each page */
static void test_one_deadline(bool urgent, bool calls)
{
    uint8_t *host = test_map(1000);
    /* A page comes each 10 ms, of a thousand; no page waits for long */
    TestRAM *t = test_ram_new(32, true, urgent ? LONG_MS : 200);
    Trickle trickle = { .t = t };
    size_t page;

    test_ram_add(t, host, 1000, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    fill_buffer(t, host);
    qemu_thread_create(&trickle.thread, "trickle", trickle_thread, &trickle,
                       QEMU_THREAD_JOINABLE);
    test_is_urgent = urgent;
    if (calls) {
        for (page = 50; page < 1000; page++) {
            snapshot_ram_release(t->ram, host + page * PAGE_SIZE, PAGE_SIZE);
        }
    } else {
        snapshot_ram_release(t->ram, host + 50 * PAGE_SIZE, 950 * PAGE_SIZE);
    }
    test_is_urgent = false;
    g_assert_nonnull(strstr(snapshot_ram_failure(t->ram), "waited too long") ?:
                     strstr(snapshot_ram_failure(t->ram), "wait too long"));
    g_assert_nonnull(strstr(snapshot_ram_failure(t->ram),
                            "snapshot-stall-limit"));
    g_assert_cmpuint(test_ram_stats(t).fault_pages, <, 500);
    qatomic_set(&trickle.stop, true);
    qemu_thread_join(&trickle.thread);
    test_ram_free(t);
    test_unmap(host, 1000);
}

static void test_deadline_call(void)
{
    test_one_deadline(false, false);
}

static void test_deadline_urgent_call(void)
{
    test_one_deadline(true, false);
}

static void test_deadline_urgent_calls(void)
{
    test_one_deadline(true, true);
}

/*
 * Each write waits for a page to be taken, and none for long.  @pause: how long
 * the guest does something else then, in relation to that.
 *
 * Returns: why the snapshot has failed, or NULL
 */
static const char *crawl(int pause)
{
    uint8_t *host = test_map(400);
    TestRAM *t = test_ram_new(32, true, LONG_MS);
    int64_t end = g_get_monotonic_time() + 3 * G_USEC_PER_SEC;
    Trickle trickle = { .t = t };
    const char *failure;
    size_t page;

    t->ram->config.stall_share = 50;
    t->ram->config.stall_window_ms = 1000;
    test_ram_add(t, host, 400, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);
    page = fill_buffer(t, host);
    qemu_thread_create(&trickle.thread, "trickle", trickle_thread, &trickle,
                       QEMU_THREAD_JOINABLE);
    for (; page < 400 && !snapshot_ram_failure(t->ram) &&
           g_get_monotonic_time() < end; page++) {
        int64_t start = g_get_monotonic_time();

        g_assert_true(fake_write(host + page * PAGE_SIZE));
        g_usleep((g_get_monotonic_time() - start) * pause);
    }
    failure = snapshot_ram_failure(t->ram);
    qatomic_set(&trickle.stop, true);
    qemu_thread_join(&trickle.thread);
    test_ram_free(t);
    test_unmap(host, 400);
    return failure;
}

static void test_stall_share(void)
{
    g_assert_null(crawl(9));
    g_assert_nonnull(strstr(crawl(0), "snapshot-stall-share"));
}

static void test_stop_wakes(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(32, true, LONG_MS);
    Writer *claimer, *claimed, *room;
    uint32_t slot;
    bool waited;

    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, &fake_trap_ops);

    claimer = writer_new_at_gate(host + 90 * PAGE_SIZE);
    fake_trap.before_release = NULL;
    claimed = writer_new(host + 90 * PAGE_SIZE);
    /* Leave nothing for the other one */
    while (page_buffer_take(t->buffer, &slot, 1, 1, true, 0, &waited)) {
        ;
    }
    room = writer_new(host + 70 * PAGE_SIZE);
    assert_waits(claimed);
    assert_waits(room);

    snapshot_ram_stop(t->ram);
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    /* The page of the one is released, though not by who claimed it */
    writer_join(claimed);
    writer_join(room);
    snapshot_ram_stop(t->ram);

    qatomic_set(&gate.leave, true);
    writer_join(claimer);
    /* It was asked for */
    g_assert_null(snapshot_ram_failure(t->ram));
    test_ram_free(t);
    test_unmap(host, 100);
}

/* From here on with each trap that is real */

/* @host: where @num_pages pages are, between and around the blocks as well */
static void run_contents(TestRAM *t, uint8_t *host, size_t num_pages,
                         const WriteTrapOps *trap, int pause_us)
{
    TestScribblers *scribblers;
    uint64_t writes;
    size_t i, num_saved = 0;
    SnapshotRAMStats stats;

    test_ram_arm(t, trap);
    scribblers = test_scribblers_start(3, host, num_pages);
    while (!test_ram_stats(t).faults) {
        g_usleep(10);
    }
    test_ram_save(t, pause_us);
    writes = test_scribblers_stop(scribblers);

    test_ram_check(t);
    for (i = 0; i < t->num_blocks; i++) {
        num_saved += bitmap_count_one(t->blocks[i]->save,
                                      t->blocks[i]->num_pages);
    }
    g_assert_cmpuint(t->saved, ==, num_saved);
    stats = test_ram_stats(t);
    g_assert_cmpuint(stats.fault_pages + stats.scan_pages, ==, num_saved);
    g_assert_cmpuint(stats.zero_pages, ==, t->saved_zero);
    g_test_message("%" PRIu64 " writes, %" PRIu64 " faults, %" PRIu64 " waits, "
                   "%" PRIu64 " pages by faults, %" PRIu64 " by the scanner",
                   writes, stats.faults, stats.waits, stats.fault_pages,
                   stats.scan_pages);
}

static void test_contents(const void *trap)
{
    static const size_t first[] = { 3000, 0, 2048, 1500 };
    static const size_t num_pages[] = { 1096, 1400, 514, 333 };
    static const size_t host_page[] = { 4 * KiB, 4 * KiB, 64 * KiB, 4 * KiB };
    int round;

    for (round = 0; round < 8; round++) {
        uint8_t *host = test_map(4096);
        TestRAM *t = test_ram_new(round < 4 ? 4096 : 512, true, LONG_MS);
        size_t i;

        for (i = 0; i < ARRAY_SIZE(first); i++) {
            test_ram_add(t, host + first[i] * PAGE_SIZE, num_pages[i],
                         host_page[i], true);
        }
        bitmap_clear(t->blocks[1]->save, 100, 300);
        run_contents(t, host, 4096, trap, 0);
        test_ram_free(t);
        test_unmap(host, 4096);
    }
}

/* The buffer is full most of the time */
static void test_contents_slow(const void *trap)
{
    uint8_t *host = test_map(4096);
    TestRAM *t = test_ram_new(64, false, LONG_MS);

    test_ram_add(t, host, 4096, PAGE_SIZE, true);
    run_contents(t, host, 4096, trap, 1000);
    g_assert_cmpuint(test_ram_stats(t).waits, >, 0);
    test_ram_free(t);
    test_unmap(host, 4096);
}

static void test_contents_huge(const void *trap)
{
    uint8_t *host = test_map(16 * 512);
    TestRAM *t = test_ram_new(1024, true, LONG_MS);

    /* Its last page is used in part */
    test_ram_add(t, host, 15 * 512 + 7, 2 * MiB, true);
    run_contents(t, host, 15 * 512 + 7, trap, 0);
    test_ram_free(t);
    test_unmap(host, 16 * 512);
}

static void test_partial(const void *trap)
{
    uint8_t *host = test_map(512);
    TestRAM *t = test_ram_new(512, true, LONG_MS);

    test_ram_add(t, host, 7, 2 * MiB, true);
    test_ram_arm(t, trap);
    /* Behind the block, but the host cannot protect less */
    qatomic_set(host + 500 * PAGE_SIZE, 1);
    test_ram_save(t, 0);
    test_ram_check(t);
    test_ram_free(t);
    test_unmap(host, 512);
}

/* A system call is not stopped: it fails, unless other threads handle it */
static void test_system_call(const void *opaque)
{
    const WriteTrapOps *trap = opaque;
    uint8_t *host = test_map(100);
    uint8_t data[PAGE_SIZE];
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    int fds[2];

    test_ram_add(t, host, 100, PAGE_SIZE, true);
    test_ram_arm(t, trap);
    memset(data, 0x55, sizeof(data));
    g_assert_cmpint(pipe(fds), ==, 0);
    g_assert_cmpint(write(fds[1], data, sizeof(data)), ==, sizeof(data));

    if (trap->in_thread) {
        g_assert_cmpint(read(fds[0], host + 20 * PAGE_SIZE, PAGE_SIZE), ==,
                        -1);
        g_assert_cmpint(errno, ==, EFAULT);
        snapshot_ram_release(t->ram, host + 20 * PAGE_SIZE, PAGE_SIZE);
    }
    g_assert_cmpint(read(fds[0], host + 20 * PAGE_SIZE, PAGE_SIZE), ==,
                    PAGE_SIZE);
    g_assert_cmpmem(host + 20 * PAGE_SIZE, PAGE_SIZE, data, PAGE_SIZE);
    g_assert_cmpuint(test_ram_stats(t).faults, ==, !trap->in_thread);

    test_ram_save(t, 0);
    test_ram_check(t);
    close(fds[0]);
    close(fds[1]);
    test_ram_free(t);
    test_unmap(host, 100);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/claims", test_claims);
    g_test_add_func("/snapshot-ram/back-pressure", test_back_pressure);
    g_test_add_func("/snapshot-ram/stall-limit", test_stall_limit);
    g_test_add_func("/snapshot-ram/stall-share", test_stall_share);
    g_test_add_func("/snapshot-ram/urgent-limit", test_urgent_limit);
    g_test_add_func("/snapshot-ram/deadline/call", test_deadline_call);
    g_test_add_func("/snapshot-ram/deadline/urgent-call",
                    test_deadline_urgent_call);
    g_test_add_func("/snapshot-ram/deadline/urgent-calls",
                    test_deadline_urgent_calls);
    g_test_add_func("/snapshot-ram/stop-wakes", test_stop_wakes);
    real_traps_add_test("/snapshot-ram", "contents", test_contents);
    real_traps_add_test("/snapshot-ram", "contents-slow", test_contents_slow);
    real_traps_add_test("/snapshot-ram", "contents-huge", test_contents_huge);
    real_traps_add_test("/snapshot-ram", "partial", test_partial);
    real_traps_add_test("/snapshot-ram", "system-call", test_system_call);
    return g_test_run();
}

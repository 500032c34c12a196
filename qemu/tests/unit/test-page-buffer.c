/*
 * Page buffer unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#ifdef CONFIG_LINUX
#include <sys/mman.h>
#endif
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "../migration/page-buffer.h"

#define SLOT_SIZE 4096
#define NUM_SLOTS 64

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

static PageBuffer *new_buffer(size_t num_slots)
{
    return page_buffer_new(num_slots * SLOT_SIZE, SLOT_SIZE, &error_abort);
}

/* When who must not wait gives up, and who may wait */
#define AT_ONCE 0
#define LATE INT64_MAX

static int64_t ms_from_now(int64_t ms)
{
    return g_get_monotonic_time() / 1000 + ms;
}

/* Take exactly @n slots, one by one: so no reserve matters */
static void take_one_by_one(PageBuffer *pb, uint32_t *slots, size_t n)
{
    bool waited = false;
    size_t i;

    for (i = 0; i < n; i++) {
        g_assert_cmpuint(page_buffer_take(pb, &slots[i], 1, 1, true, AT_ONCE,
                                          &waited),
                         ==, 1);
    }
    g_assert_false(waited);
}

static void test_new(void)
{
    PageBuffer *pb = page_buffer_new(3 * SLOT_SIZE + 1, SLOT_SIZE,
                                     &error_abort);
    Error *err = NULL;
    uint32_t slot;

    g_assert_cmpuint(page_buffer_num_slots(pb), ==, 3);
    g_assert_cmpuint(page_buffer_peak(pb), ==, 0);
    g_assert_cmpuint(page_buffer_dequeue(pb, &slot, 1, false),
                     ==, 0);
    /* All slots are free, so there is nothing to wait for */
    g_assert_cmpuint(page_buffer_dequeue(pb, &slot, 1, true),
                     ==, 0);
    page_buffer_free(pb);

    /* Half of the address space */
    pb = page_buffer_new(SIZE_MAX / 2 + 1, SIZE_MAX / 4 + 1, &err);
    g_assert_null(pb);
    error_free_or_abort(&err);
}

static void test_order(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t in[7], out[5];
    uint64_t queued = 0, dequeued = 0;
    size_t i, n;

    /* Sizes that divide neither each other nor the ring's */
    while (dequeued < 1000) {
        if (queued - dequeued + ARRAY_SIZE(in) <= NUM_SLOTS) {
            take_one_by_one(pb, in, ARRAY_SIZE(in));
            for (i = 0; i < ARRAY_SIZE(in); i++) {
                page_buffer_entry(pb, in[i])->offset = queued;
                memset(page_buffer_data(pb, in[i]), queued++, SLOT_SIZE);
            }
            page_buffer_queue(pb, in, ARRAY_SIZE(in));
        }
        n = page_buffer_dequeue(pb, out, ARRAY_SIZE(out), true);
        g_assert_cmpuint(n, ==, ARRAY_SIZE(out));
        for (i = 0; i < n; i++) {
            uint8_t *data = page_buffer_data(pb, out[i]);

            g_assert_cmpuint(page_buffer_entry(pb, out[i])->offset, ==,
                             dequeued);
            g_assert_cmpuint(data[0], ==, (uint8_t)dequeued);
            g_assert_cmpuint(data[SLOT_SIZE - 1], ==, (uint8_t)dequeued);
            dequeued++;
        }
        page_buffer_give(pb, out, n);
    }
    page_buffer_free(pb);
}

static void test_take_reserve(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS];
    unsigned long seen[BITS_TO_LONGS(NUM_SLOTS)] = { 0 };
    bool waited = false;
    size_t n;

    n = page_buffer_take(pb, slots, 2, 10, false, AT_ONCE, &waited);
    g_assert_cmpuint(n, ==, 10);
    /* An eighth is left to those who need less */
    n += page_buffer_take(pb, slots + n, 2, NUM_SLOTS - n, false, AT_ONCE,
                          &waited);
    g_assert_cmpuint(n, ==, NUM_SLOTS - NUM_SLOTS / 8);
    n += page_buffer_take(pb, slots + n, 2, 8, false, AT_ONCE, &waited);
    g_assert_cmpuint(n, ==, NUM_SLOTS - NUM_SLOTS / 8 + 2);
    take_one_by_one(pb, slots + n, NUM_SLOTS - n);
    g_assert_false(waited);

    for (n = 0; n < NUM_SLOTS; n++) {
        g_assert_cmpuint(slots[n], <, NUM_SLOTS);
        g_assert_false(test_and_set_bit(slots[n], seen));
    }
    page_buffer_give(pb, slots, NUM_SLOTS);
    page_buffer_free(pb);
}

static void test_take_timeout(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS];
    bool waited = false;
    int64_t start;

    take_one_by_one(pb, slots, NUM_SLOTS - 1);

    /* One is left, which is not enough */
    start = g_get_monotonic_time();
    g_assert_cmpuint(page_buffer_take(pb, slots, 2, 2, true, ms_from_now(50),
                                      &waited), ==, 0);
    g_assert_cmpint(g_get_monotonic_time() - start, >=, 45 * 1000);
    g_assert_true(waited);

    /* And it is still there */
    g_assert_cmpuint(page_buffer_take(pb, slots, 1, 2, true, AT_ONCE, &waited),
                     ==, 1);
    page_buffer_free(pb);
}

static void test_try_take(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS];
    size_t half = NUM_SLOTS / 2;
    size_t n;

    n = page_buffer_try_take(pb, slots, 1, 10, half);
    g_assert_cmpuint(n, ==, 10);
    /* Not enough above the mark */
    g_assert_cmpuint(page_buffer_try_take(pb, slots + n, half - 9, half, half),
                     ==, 0);
    n += page_buffer_try_take(pb, slots + n, 1, NUM_SLOTS - n, half);
    g_assert_cmpuint(n, ==, half);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 1, half), ==, 0);

    /* Queued slots are no room either */
    page_buffer_queue(pb, slots, n);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 1, half), ==, 0);
    n = page_buffer_dequeue(pb, slots, NUM_SLOTS, false);
    g_assert_cmpuint(n, ==, half);
    page_buffer_give(pb, slots, 1);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 2, half), ==, 1);

    /* Who needs more than half gets it from an empty buffer only */
    page_buffer_give(pb, slots, n - 1);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, half + 1, NUM_SLOTS, half),
                     ==, 0);
    page_buffer_give(pb, slots + n - 1, 1);
    n = page_buffer_try_take(pb, slots, half + 1, NUM_SLOTS, half);
    g_assert_cmpuint(n, ==, half + 1);
    page_buffer_give(pb, slots, n);

    page_buffer_stop(pb);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 1, half), ==, 0);
    page_buffer_free(pb);
}

/* The last slots are for who is urgent, and others wait for more */
static void test_urgent(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS];
    size_t reserve = NUM_SLOTS / 32, n;
    bool waited = false;

    take_one_by_one(pb, slots, NUM_SLOTS - reserve - 1);
    n = page_buffer_take(pb, slots, 1, 1, false, AT_ONCE, &waited);
    g_assert_cmpuint(n, ==, 1);
    g_assert_false(waited);
    n = page_buffer_take(pb, slots, 1, 1, false, AT_ONCE, &waited);
    g_assert_cmpuint(n, ==, 0);
    g_assert_true(waited);
    take_one_by_one(pb, slots, reserve);
    page_buffer_free(pb);

    /* All of an empty buffer may be had by anybody */
    pb = new_buffer(NUM_SLOTS);
    waited = false;
    n = page_buffer_take(pb, slots, NUM_SLOTS, NUM_SLOTS, false, AT_ONCE,
                         &waited);
    g_assert_cmpuint(n, ==, NUM_SLOTS);
    g_assert_false(waited);
    page_buffer_free(pb);
}

static void test_stop(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS], slot;
    bool waited = false;

    take_one_by_one(pb, slots, NUM_SLOTS);
    page_buffer_stop(pb);
    page_buffer_stop(pb);

    /* Free slots are not given any more, nor waited for */
    page_buffer_give(pb, slots, 1);
    g_assert_cmpuint(page_buffer_take(pb, &slot, 1, 1, true, LATE, &waited), ==,
                     0);
    g_assert_false(waited);
    g_assert_cmpuint(page_buffer_dequeue(pb, &slot, 1, true),
                     ==, 0);

    /* All go back, none is queued */
    page_buffer_queue(pb, slots + 1, NUM_SLOTS - 2);
    g_assert_cmpuint(page_buffer_dequeue(pb, &slot, 1, false),
                     ==, 0);
    page_buffer_give(pb, slots + NUM_SLOTS - 1, 1);
    page_buffer_free(pb);
}

typedef struct Waiter {
    PageBuffer *pb;
    QemuThread thread;
    unsigned int given;
    size_t n;
    bool waited;
    bool done;
    uint32_t slots[2];
} Waiter;

static void *waiter_take(void *opaque)
{
    Waiter *w = opaque;

    w->n = page_buffer_take(w->pb, w->slots, 2, 2, true, ms_from_now(LONG_MS),
                            &w->waited);
    qatomic_set(&w->done, true);
    return NULL;
}

static void *waiter_dequeue(void *opaque)
{
    Waiter *w = opaque;

    w->n = page_buffer_dequeue(w->pb, w->slots, 2, true);
    qatomic_set(&w->done, true);
    return NULL;
}

static void *waiter_wait(void *opaque)
{
    Waiter *w = opaque;

    page_buffer_wait(w->pb, w->given);
    w->n = page_buffer_dequeue(w->pb, w->slots, 2, false);
    qatomic_set(&w->done, true);
    return NULL;
}

static Waiter *waiter_new(PageBuffer *pb, void *(*fn)(void *))
{
    Waiter *w = g_new0(Waiter, 1);

    w->pb = pb;
    w->given = page_buffer_given(pb);
    qemu_thread_create(&w->thread, "waiter", fn, w, QEMU_THREAD_JOINABLE);
    if (fn == waiter_take) {
        /* It is set with the lock held that is free only when it waits */
        while (!qatomic_read(&w->waited)) {
            g_usleep(100);
        }
    } else {
        g_usleep(20 * 1000);
    }
    g_assert_false(qatomic_read(&w->done));
    return w;
}

/* Returns how many slots the waiter has got */
static size_t waiter_free(Waiter *w)
{
    size_t n;

    qemu_thread_join(&w->thread);
    n = w->n;
    g_free(w);
    return n;
}

static void test_take_waits(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[NUM_SLOTS];
    Waiter *one, *other;

    take_one_by_one(pb, slots, NUM_SLOTS);
    one = waiter_new(pb, waiter_take);
    other = waiter_new(pb, waiter_take);

    /* Enough for one of them, but not at once */
    page_buffer_give(pb, slots, 1);
    g_usleep(20 * 1000);
    g_assert_false(qatomic_read(&one->done) || qatomic_read(&other->done));
    page_buffer_give(pb, slots + 1, 1);
    while (!qatomic_read(&one->done) && !qatomic_read(&other->done)) {
        g_usleep(100);
    }
    g_usleep(20 * 1000);
    g_assert_false(qatomic_read(&one->done) && qatomic_read(&other->done));

    page_buffer_stop(pb);
    g_assert_cmpuint(waiter_free(one) + waiter_free(other), ==, 2);
    page_buffer_free(pb);
}

/* Who can wait gets nothing that somebody waits for, be it enough or not */
static void test_waiters_first(void)
{
    PageBuffer *pb = new_buffer(4);
    uint32_t slots[4];
    Waiter *w;
    int i;

    take_one_by_one(pb, slots, 4);
    w = waiter_new(pb, waiter_take);
    page_buffer_give(pb, slots, 1);
    for (i = 0; i < 100; i++) {
        g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 1, 0), ==, 0);
        g_usleep(100);
    }
    g_assert_false(qatomic_read(&w->done));
    page_buffer_give(pb, slots + 1, 1);
    g_assert_cmpuint(waiter_free(w), ==, 2);
    page_buffer_give(pb, slots + 2, 1);
    g_assert_cmpuint(page_buffer_try_take(pb, slots, 1, 1, 0), ==, 1);
    page_buffer_free(pb);
}

static void test_dequeue_waits(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    unsigned int given;
    uint32_t slots[3];
    Waiter *w;

    /* Slots are out, of which one comes */
    take_one_by_one(pb, slots, 3);
    w = waiter_new(pb, waiter_dequeue);
    page_buffer_queue(pb, slots, 1);
    g_assert_cmpuint(waiter_free(w), ==, 1);

    /* The others come back unused; those dequeued before count as well */
    w = waiter_new(pb, waiter_dequeue);
    page_buffer_give(pb, slots + 1, 2);
    g_usleep(20 * 1000);
    g_assert_false(qatomic_read(&w->done));
    page_buffer_give(pb, slots, 1);
    g_assert_cmpuint(waiter_free(w), ==, 0);

    /* Nothing is queued, but room has come that it waits for as well */
    take_one_by_one(pb, slots, 2);
    w = waiter_new(pb, waiter_wait);
    page_buffer_give(pb, slots, 1);
    g_assert_cmpuint(waiter_free(w), ==, 0);

    /* The same, just before it waits */
    given = page_buffer_given(pb);
    take_one_by_one(pb, slots, 1);
    page_buffer_give(pb, slots, 1);
    page_buffer_wait(pb, given);
    page_buffer_give(pb, slots + 1, 1);

    /* Nothing is out */
    page_buffer_wait(pb, page_buffer_given(pb));

    take_one_by_one(pb, slots, 1);
    w = waiter_new(pb, waiter_dequeue);
    page_buffer_stop(pb);
    g_assert_cmpuint(waiter_free(w), ==, 0);
    page_buffer_free(pb);
}

static void test_peak(void)
{
    PageBuffer *pb = new_buffer(NUM_SLOTS);
    uint32_t slots[20];

    take_one_by_one(pb, slots, 5);
    g_assert_cmpuint(page_buffer_peak(pb), ==, 5);
    page_buffer_queue(pb, slots, 5);
    g_assert_cmpuint(page_buffer_try_take(pb, slots + 5, 1, 15, NUM_SLOTS / 2),
                     ==, 15);
    g_assert_cmpuint(page_buffer_peak(pb), ==, 20);

    page_buffer_give(pb, slots + 5, 15);
    page_buffer_give(pb, slots, page_buffer_dequeue(pb, slots, 5,
                                                    true));
    take_one_by_one(pb, slots, 1);
    g_assert_cmpuint(page_buffer_peak(pb), ==, 20);
    page_buffer_free(pb);
}

#ifdef CONFIG_LINUX
/* How many bytes of the slots are in memory */
static size_t resident(PageBuffer *pb)
{
    size_t page = qemu_real_host_page_size();
    size_t size = page_buffer_num_slots(pb) * SLOT_SIZE;
    g_autofree unsigned char *vec = g_malloc(DIV_ROUND_UP(size, page));
    size_t i, bytes = 0;

    g_assert_cmpint(mincore(page_buffer_data(pb, 0), size, vec), ==, 0);
    for (i = 0; i < DIV_ROUND_UP(size, page); i++) {
        bytes += vec[i] & 1 ? page : 0;
    }
    return bytes;
}

/* What is allocated ahead, if the host can do that */
#define WARM_SIZE (16 * MiB)

static void test_memory(void)
{
    size_t num_slots = 64 * MiB / SLOT_SIZE;
    PageBuffer *pb = new_buffer(num_slots);
    size_t ahead = resident(pb);
    uint32_t slots[8];
    size_t round, i, bytes;

    g_assert_true(ahead == 0 || ahead == WARM_SIZE);

    /* Much more passes through than the buffer holds */
    for (round = 0; round < num_slots; round++) {
        take_one_by_one(pb, slots, ARRAY_SIZE(slots));
        for (i = 0; i < ARRAY_SIZE(slots); i++) {
            memset(page_buffer_data(pb, slots[i]), 1, SLOT_SIZE);
        }
        page_buffer_queue(pb, slots, ARRAY_SIZE(slots));
        g_assert_cmpuint(page_buffer_dequeue(pb, slots, 8, true),
                         ==, 8);
        page_buffer_give(pb, slots, ARRAY_SIZE(slots));
    }

    /* Not more than was in use at a time, but the host's pages may be huge */
    bytes = resident(pb);
    g_assert_cmpuint(bytes, >=, ARRAY_SIZE(slots) * SLOT_SIZE);
    g_assert_cmpuint(bytes, <=, ahead + MAX(ARRAY_SIZE(slots) * SLOT_SIZE,
                                            2 * MiB));
    page_buffer_free(pb);
}

static void test_warm(void)
{
    size_t used = 40 * MiB / SLOT_SIZE;
    PageBuffer *pb = new_buffer(64 * MiB / SLOT_SIZE);
    g_autofree uint32_t *slots = g_new(uint32_t, used);

    if (!resident(pb)) {
        g_test_skip("the host does not populate memory ahead");
        page_buffer_free(pb);
        return;
    }
    take_one_by_one(pb, slots, used);
    g_assert_cmpuint(resident(pb), ==, WARM_SIZE);
    page_buffer_warm(pb);
    g_assert_cmpuint(resident(pb), ==, 40 * MiB + WARM_SIZE);

    /* Not because others were given back, and not beyond the end */
    page_buffer_give(pb, slots, used);
    page_buffer_warm(pb);
    g_assert_cmpuint(resident(pb), ==, 40 * MiB + WARM_SIZE);
    take_one_by_one(pb, slots, used);
    page_buffer_warm(pb);
    g_assert_cmpuint(resident(pb), ==, 40 * MiB + WARM_SIZE);
    page_buffer_give(pb, slots, used);
    page_buffer_free(pb);
}
#endif

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/page-buffer/new", test_new);
    g_test_add_func("/page-buffer/order", test_order);
    g_test_add_func("/page-buffer/take/reserve", test_take_reserve);
    g_test_add_func("/page-buffer/take/timeout", test_take_timeout);
    g_test_add_func("/page-buffer/take/waits", test_take_waits);
    g_test_add_func("/page-buffer/take/urgent", test_urgent);
    g_test_add_func("/page-buffer/take/waiters-first", test_waiters_first);
    g_test_add_func("/page-buffer/try-take", test_try_take);
    g_test_add_func("/page-buffer/dequeue/waits", test_dequeue_waits);
    g_test_add_func("/page-buffer/stop", test_stop);
    g_test_add_func("/page-buffer/peak", test_peak);
#ifdef CONFIG_LINUX
    g_test_add_func("/page-buffer/memory", test_memory);
    g_test_add_func("/page-buffer/warm", test_warm);
#endif
    return g_test_run();
}

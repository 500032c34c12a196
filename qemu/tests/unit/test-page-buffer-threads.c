/*
 * Page buffer unit tests: many producers and consumers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/thread.h"
#include "../migration/page-buffer.h"

#define SLOT_SIZE 4096
#define NUM_SLOTS 64

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

#define NUM_PRODUCERS 4
#define NUM_CONSUMERS 3
#define NUM_PAGES 30000

typedef struct Traffic Traffic;

typedef struct Producer {
    Traffic *traffic;
    QemuThread thread;
    uint64_t produced;
    uint8_t arrived[NUM_PAGES];
} Producer;

struct Traffic {
    PageBuffer *pb;
    bool produced;
    uint64_t consumed;
    Producer producers[NUM_PRODUCERS];
};

static void *produce(void *opaque)
{
    Producer *p = opaque;
    PageBuffer *pb = p->traffic->pb;
    bool scanner = p == &p->traffic->producers[0];
    uint32_t slots[8];
    bool waited;

    while (p->produced < NUM_PAGES) {
        size_t i, n, used;

        if (scanner) {
            n = page_buffer_try_take(pb, slots, 1, ARRAY_SIZE(slots),
                                     page_buffer_num_slots(pb) / 2);
        } else {
            n = page_buffer_take(pb, slots, 1, ARRAY_SIZE(slots), false,
                                 g_get_monotonic_time() / 1000 + LONG_MS,
                                 &waited);
        }
        if (!n && scanner && !qatomic_read(&p->traffic->produced)) {
            g_usleep(10);
            continue;
        }
        if (!n) {
            break;
        }

        used = MIN(n, 1 + p->produced % ARRAY_SIZE(slots));
        used = MIN(used, NUM_PAGES - p->produced);
        for (i = 0; i < used; i++) {
            uint64_t *data = page_buffer_data(pb, slots[i]);

            page_buffer_entry(pb, slots[i])->owner = p;
            page_buffer_entry(pb, slots[i])->offset = p->produced;
            data[0] = p->produced;
            data[SLOT_SIZE / sizeof(*data) - 1] = p->produced++;
        }
        page_buffer_queue(pb, slots, used);
        page_buffer_give(pb, slots + used, n - used);
    }
    return NULL;
}

static void *consume(void *opaque)
{
    Traffic *t = opaque;
    uint64_t next[NUM_PRODUCERS] = { 0 };
    uint32_t slots[5];
    bool last;

    do {
        size_t i, n;

        last = qatomic_read(&t->produced);
        while ((n = page_buffer_dequeue(t->pb, slots, ARRAY_SIZE(slots),
                                        true))) {
            for (i = 0; i < n; i++) {
                PageBufferEntry *entry = page_buffer_entry(t->pb, slots[i]);
                uint64_t *data = page_buffer_data(t->pb, slots[i]);
                Producer *p = entry->owner;
                size_t id = p - t->producers;

                g_assert_cmpuint(id, <, NUM_PRODUCERS);
                g_assert_cmpuint(entry->offset, <, NUM_PAGES);
                /* One consumer sees each producer's pages in order */
                g_assert_cmpuint(entry->offset, >=, next[id]);
                next[id] = entry->offset + 1;
                g_assert_cmpuint(data[0], ==, entry->offset);
                g_assert_cmpuint(data[SLOT_SIZE / sizeof(*data) - 1], ==,
                                 entry->offset);
                /* And nobody has seen this one */
                g_assert_cmpuint(qatomic_fetch_inc(&p->arrived[entry->offset]),
                                 ==, 0);
            }
            qatomic_add(&t->consumed, n);
            page_buffer_give(t->pb, slots, n);
        }
    } while (!last);
    return NULL;
}

/* Runs all threads; stops the buffer when @stop_after pages have passed */
static void run_traffic(uint64_t stop_after)
{
    Traffic *t = g_new0(Traffic, 1);
    QemuThread consumers[NUM_CONSUMERS];
    uint64_t consumed = 0;
    size_t i, j;

    t->pb = page_buffer_new(NUM_SLOTS * SLOT_SIZE, SLOT_SIZE, &error_abort);
    for (i = 0; i < NUM_PRODUCERS; i++) {
        t->producers[i].traffic = t;
        qemu_thread_create(&t->producers[i].thread, "producer", produce,
                           &t->producers[i], QEMU_THREAD_JOINABLE);
    }
    for (i = 0; i < NUM_CONSUMERS; i++) {
        qemu_thread_create(&consumers[i], "consumer", consume, t,
                           QEMU_THREAD_JOINABLE);
    }

    if (stop_after) {
        while (qatomic_read(&t->consumed) < stop_after) {
            g_usleep(100);
        }
        page_buffer_stop(t->pb);
        qatomic_set(&t->produced, true);
    }
    for (i = 0; i < NUM_PRODUCERS; i++) {
        qemu_thread_join(&t->producers[i].thread);
    }
    qatomic_set(&t->produced, true);
    for (i = 0; i < NUM_CONSUMERS; i++) {
        qemu_thread_join(&consumers[i]);
    }

    for (i = 0; i < NUM_PRODUCERS; i++) {
        Producer *p = &t->producers[i];

        for (j = 0; j < NUM_PAGES; j++) {
            g_assert_true(p->arrived[j] || stop_after);
            consumed += p->arrived[j];
        }
    }
    g_assert_cmpuint(consumed, ==, t->consumed);
    g_assert_cmpuint(page_buffer_peak(t->pb), <=, NUM_SLOTS);
    page_buffer_free(t->pb);
    g_free(t);
}

static void test_threads(void)
{
    run_traffic(0);
}

static void test_threads_stop(void)
{
    int i;

    for (i = 1; i <= 20; i++) {
        run_traffic(i * 50);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/page-buffer/threads", test_threads);
    g_test_add_func("/page-buffer/threads/stop", test_threads_stop);
    return g_test_run();
}

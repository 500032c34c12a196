/*
 * Page buffer: the bounded pool of page copies of a background snapshot
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
#include "qemu/host-utils.h"
#include "qemu/lockable.h"
#include "qemu/madvise.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "page-buffer.h"

/*
 * Memory that is allocated ahead of use: what 2,000 writes a second, with 64
 * KiB around each, fill while a destination is busy for an eighth of a second.
 */
#define WARM_SIZE (16 * MiB)

/* Of the slots, what part is left to others by who wants more than it needs */
#define WINDOW_FRACTION 8

/* And what part to those for whom others wait */
#define URGENT_FRACTION 32

/* So many are taken at a time by those who want many */
#define RUN_SLOTS 512

struct PageBuffer {
    /* Set at creation */
    uint8_t *data;
    size_t size;
    PageBufferEntry *entries;
    size_t slot_size;
    size_t num_slots;

    /* So many of the first slots are allocated by the host */
    size_t num_warm;
    /* A consumer is at that */
    bool warming;

    /* Protects all below.  Nobody touches guest RAM while holding it. */
    QemuMutex lock;
    /* Signalled when slots became free, and at stop */
    QemuCond free_cond;
    /* Signalled when slots are queued or given back, and at stop */
    QemuCond queue_cond;
    /* Consumers who wait */
    unsigned int consumers;
    /* How often slots were given back; read without the lock as well */
    unsigned int num_given;
    bool stopped;

    /* Stack of free slots */
    uint32_t *free;
    size_t num_free;
    size_t min_free;
    /* Callers who wait for slots */
    unsigned int waiters;

    /* Ring of queued slots, with a place for each */
    uint32_t *ring;
    size_t ring_head;
    size_t num_queued;
};

#ifdef CONFIG_LINUX
/*
 * With -overcommit mem-lock=on, what is mapped is locked, and counts as a whole
 * against the process's limit.  So unlock a single page, and let that grow.
 */
static void *page_buffer_map(size_t size)
{
    size_t page_size = qemu_real_host_page_size();
    void *page = mmap(NULL, page_size, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *data;

    if (page == MAP_FAILED) {
        return NULL;
    }
    munlock(page, page_size);
    data = mremap(page, page_size, size, MREMAP_MAYMOVE);
    if (data == MAP_FAILED) {
        munmap(page, page_size);
        return NULL;
    }
    if (mprotect(data, size, PROT_READ | PROT_WRITE) < 0) {
        munmap(data, size);
        return NULL;
    }
    qemu_madvise(data, size, QEMU_MADV_HUGEPAGE);
    return data;
}

static void page_buffer_unmap(void *data, size_t size)
{
    if (data) {
        munmap(data, size);
    }
}
#else
static void *page_buffer_map(size_t size)
{
    return qemu_anon_ram_alloc(size, NULL, false, true);
}

static void page_buffer_unmap(void *data, size_t size)
{
    qemu_anon_ram_free(data, size);
}
#endif

PageBuffer *page_buffer_new(size_t size, size_t slot_size, Error **errp)
{
    PageBuffer *pb = g_new0(PageBuffer, 1);
    size_t i;

    pb->slot_size = slot_size;
    pb->num_slots = size / slot_size;
    assert(is_power_of_2(slot_size));
    assert(pb->num_slots > 0 && pb->num_slots < UINT32_MAX);

    /* Whole pages of the host's */
    pb->size = ROUND_UP(pb->num_slots * slot_size, qemu_real_host_page_size());
    pb->data = page_buffer_map(pb->size);
    pb->free = g_try_new(uint32_t, pb->num_slots);
    pb->ring = g_try_new(uint32_t, pb->num_slots);
    pb->entries = g_try_new(PageBufferEntry, pb->num_slots);
    qemu_mutex_init(&pb->lock);
    qemu_cond_init(&pb->free_cond);
    qemu_cond_init(&pb->queue_cond);
    if (!pb->data || !pb->free || !pb->ring || !pb->entries) {
        error_setg(errp, "Cannot allocate a page buffer of %zu bytes", size);
        page_buffer_free(pb);
        return NULL;
    }

    /* Low slots are used first, and runs of them are in order */
    for (i = 0; i < pb->num_slots; i++) {
        size_t run = QEMU_ALIGN_DOWN(i, RUN_SLOTS);
        size_t end = MIN(run + RUN_SLOTS, pb->num_slots);

        pb->free[pb->num_slots - end + i - run] = i;
    }
    pb->num_free = pb->min_free = pb->num_slots;
    page_buffer_warm(pb);
    return pb;
}

void page_buffer_free(PageBuffer *pb)
{
    qemu_cond_destroy(&pb->queue_cond);
    qemu_cond_destroy(&pb->free_cond);
    qemu_mutex_destroy(&pb->lock);
    g_free(pb->entries);
    g_free(pb->ring);
    g_free(pb->free);
    page_buffer_unmap(pb->data, pb->size);
    g_free(pb);
}

PageBufferEntry *page_buffer_entry(PageBuffer *pb, uint32_t slot)
{
    return &pb->entries[slot];
}

void *page_buffer_data(PageBuffer *pb, uint32_t slot)
{
    return pb->data + slot * pb->slot_size;
}

static size_t page_buffer_pop_free(PageBuffer *pb, uint32_t *slots, size_t n)
{
    pb->num_free -= n;
    pb->min_free = MIN(pb->min_free, pb->num_free);
    memcpy(slots, pb->free + pb->num_free, n * sizeof(*slots));
    return n;
}

static void page_buffer_push_free(PageBuffer *pb, uint32_t slot)
{
    pb->free[pb->num_free++] = slot;
}

/* To be called when slots were freed */
static void page_buffer_signal_free(PageBuffer *pb)
{
    qatomic_set(&pb->num_given, pb->num_given + 1);
    if (pb->waiters) {
        qemu_cond_broadcast(&pb->free_cond);
    }
    if (pb->consumers) {
        qemu_cond_broadcast(&pb->queue_cond);
    }
}

/* Is there a slot for each of @n, and enough left for the urgent? */
static bool page_buffer_has_free(PageBuffer *pb, size_t n, bool urgent)
{
    size_t reserve = urgent ? 0 : pb->num_slots / URGENT_FRACTION;

    /* A buffer with nothing in it will never have more */
    return pb->num_free >= n + reserve ||
           (pb->num_free >= n && pb->num_free == pb->num_slots);
}

size_t page_buffer_take(PageBuffer *pb, uint32_t *slots, size_t min,
                        size_t max, bool urgent, int64_t deadline_ms,
                        bool *waited)
{
    size_t reserve = pb->num_slots / WINDOW_FRACTION;
    size_t spare;
    QEMU_LOCK_GUARD(&pb->lock);

    assert(min > 0 && min <= max && min <= pb->num_slots);

    while (!pb->stopped && !page_buffer_has_free(pb, min, urgent)) {
        int64_t now = g_get_monotonic_time() / 1000;

        *waited = true;
        if (now >= deadline_ms) {
            return 0;
        }
        pb->waiters++;
        qemu_cond_timedwait(&pb->free_cond, &pb->lock, deadline_ms - now);
        pb->waiters--;
    }
    if (pb->stopped) {
        return 0;
    }

    spare = pb->num_free > reserve ? pb->num_free - reserve : 0;
    return page_buffer_pop_free(pb, slots, MAX(min, MIN(max, spare)));
}

size_t page_buffer_try_take(PageBuffer *pb, uint32_t *slots, size_t min,
                            size_t max, size_t leave)
{
    size_t spare;
    QEMU_LOCK_GUARD(&pb->lock);

    assert(min > 0 && min <= max && min <= pb->num_slots);

    spare = pb->num_free > leave ? pb->num_free - leave : 0;
    if (pb->num_free == pb->num_slots) {
        spare = MAX(spare, min);
    }
    if (pb->stopped || pb->waiters || spare < min) {
        return 0;
    }
    return page_buffer_pop_free(pb, slots, MIN(max, spare));
}

void page_buffer_give(PageBuffer *pb, const uint32_t *slots, size_t n)
{
    size_t i;

    if (!n) {
        return;
    }
    QEMU_LOCK_GUARD(&pb->lock);
    assert(pb->num_free + pb->num_queued + n <= pb->num_slots);
    for (i = 0; i < n; i++) {
        page_buffer_push_free(pb, slots[i]);
    }
    page_buffer_signal_free(pb);
}

void page_buffer_queue(PageBuffer *pb, const uint32_t *slots, size_t n)
{
    size_t i;
    QEMU_LOCK_GUARD(&pb->lock);

    assert(pb->num_free + pb->num_queued + n <= pb->num_slots);
    if (pb->stopped) {
        for (i = 0; i < n; i++) {
            page_buffer_push_free(pb, slots[i]);
        }
        page_buffer_signal_free(pb);
        return;
    }

    for (i = 0; i < n; i++) {
        size_t tail = (pb->ring_head + pb->num_queued) % pb->num_slots;

        pb->ring[tail] = slots[i];
        pb->num_queued++;
    }
    qemu_cond_signal(&pb->queue_cond);
}

/* Could something be queued yet, though nothing is?  With the lock held. */
static bool page_buffer_may_be_queued(PageBuffer *pb)
{
    return !pb->stopped && !pb->num_queued && pb->num_free < pb->num_slots;
}

/* With the lock held */
static void page_buffer_wait_for_queue(PageBuffer *pb)
{
    pb->consumers++;
    qemu_cond_wait(&pb->queue_cond, &pb->lock);
    pb->consumers--;
}

size_t page_buffer_dequeue(PageBuffer *pb, uint32_t *slots, size_t max,
                           bool wait)
{
    size_t i, n;
    QEMU_LOCK_GUARD(&pb->lock);

    while (wait && page_buffer_may_be_queued(pb)) {
        page_buffer_wait_for_queue(pb);
    }
    if (pb->stopped) {
        return 0;
    }

    n = MIN(max, pb->num_queued);
    for (i = 0; i < n; i++) {
        slots[i] = pb->ring[pb->ring_head];
        pb->ring_head = (pb->ring_head + 1) % pb->num_slots;
    }
    pb->num_queued -= n;
    return n;
}

unsigned int page_buffer_given(PageBuffer *pb)
{
    return qatomic_read(&pb->num_given);
}

void page_buffer_wait(PageBuffer *pb, unsigned int given)
{
    QEMU_LOCK_GUARD(&pb->lock);

    while (page_buffer_may_be_queued(pb) && pb->num_given == given) {
        page_buffer_wait_for_queue(pb);
    }
}

void page_buffer_warm(PageBuffer *pb)
{
    size_t want = MIN(page_buffer_peak(pb) + WARM_SIZE / pb->slot_size,
                      pb->num_slots);
    size_t i;

    if (qatomic_xchg(&pb->warming, true)) {
        return;
    }
    if (pb->num_warm < want) {
        /*
         * One by one: in a system call, it would hold the lock of the process's
         * mappings for all of them, which faults need.  May be in use by now.
         */
        for (i = pb->num_warm * pb->slot_size; i < want * pb->slot_size;
             i += qemu_real_host_page_size()) {
            qatomic_or(&pb->data[i], 0);
        }
        pb->num_warm = want;
    }
    qatomic_store_release(&pb->warming, false);
}

void page_buffer_stop(PageBuffer *pb)
{
    QEMU_LOCK_GUARD(&pb->lock);

    pb->stopped = true;
    qemu_cond_broadcast(&pb->free_cond);
    qemu_cond_broadcast(&pb->queue_cond);
}

size_t page_buffer_num_slots(PageBuffer *pb)
{
    return pb->num_slots;
}

size_t page_buffer_waiting(PageBuffer *pb)
{
    QEMU_LOCK_GUARD(&pb->lock);

    return pb->waiters;
}

size_t page_buffer_used(PageBuffer *pb)
{
    QEMU_LOCK_GUARD(&pb->lock);

    return pb->num_slots - pb->num_free;
}

size_t page_buffer_peak(PageBuffer *pb)
{
    QEMU_LOCK_GUARD(&pb->lock);

    return pb->num_slots - pb->min_free;
}

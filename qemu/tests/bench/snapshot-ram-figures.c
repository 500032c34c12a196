/*
 * Figures of snapshot-ram-bench: times, and how often locks are taken
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/host-utils.h"
#include "../migration/snapshot-ram-internal.h"
#include "snapshot-ram-figures.h"

void histogram_add(Histogram *h, int64_t ns)
{
    int log = 63 - clz64(MAX(ns, STEPS));

    h->count[log * STEPS + ((MAX(ns, STEPS) >> (log - 3)) & (STEPS - 1))]++;
    h->total++;
    h->max = MAX(h->max, ns);
}

void histogram_merge(Histogram *h, const Histogram *from)
{
    size_t i;

    for (i = 0; i < ARRAY_SIZE(h->count); i++) {
        h->count[i] += from->count[i];
    }
    h->total += from->total;
    h->max = MAX(h->max, from->max);
}

/* In microseconds, rounded up to the next step */
static double histogram_us(const Histogram *h, double part)
{
    uint64_t sum = 0;
    size_t i;

    for (i = 0; i < ARRAY_SIZE(h->count); i++) {
        sum += h->count[i];
        if (sum && sum >= h->total * part) {
            return MIN((STEPS + i % STEPS + 1ULL) << (i / STEPS - 3),
                       h->max) / 1000.0;
        }
    }
    return 0;
}

void histogram_print(const char *name, const Histogram *h)
{
    printf(", \"%s\": {\"count\": %" PRIu64 ", \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f}", name,
           h->total, histogram_us(h, 0.5), histogram_us(h, 0.99),
           histogram_us(h, 0.999), h->max / 1000.0);
}

/* Locks, told by what they are for */
typedef struct LockCount {
    const char *name;
    uint64_t taken;
    uint64_t contended;
    uint64_t woken;
} LockCount;

static LockCount locks[] = {
    { .name = "scan" }, { .name = "released" }, { .name = "buffer" }
};

static SnapshotRAM *counted;

static LockCount *find_lock(QemuMutex *mutex)
{
    /* There are no others meanwhile */
    return &locks[mutex == &counted->scan_lock ? 0 :
                  mutex == &counted->lock ? 1 : 2];
}

static void count_lock(QemuMutex *mutex, const char *file, int line)
{
    LockCount *l = find_lock(mutex);

    if (qemu_mutex_trylock_impl(mutex, file, line)) {
        qatomic_inc(&l->contended);
        qemu_mutex_lock_impl(mutex, file, line);
    }
    qatomic_inc(&l->taken);
}

static void count_wait(QemuCond *cond, QemuMutex *mutex, const char *file,
                       int line)
{
    qemu_cond_wait_impl(cond, mutex, file, line);
    qatomic_inc(&find_lock(mutex)->woken);
}

static bool count_timedwait(QemuCond *cond, QemuMutex *mutex, int ms,
                            const char *file, int line)
{
    bool ret = qemu_cond_timedwait_impl(cond, mutex, ms, file, line);

    qatomic_inc(&find_lock(mutex)->woken);
    return ret;
}

void lock_counts_begin(SnapshotRAM *ram)
{
    counted = ram;
    qatomic_set(&qemu_mutex_lock_func, count_lock);
    qatomic_set(&qemu_cond_wait_func, count_wait);
    qatomic_set(&qemu_cond_timedwait_func, count_timedwait);
}

void lock_counts_end(void)
{
    qatomic_set(&qemu_mutex_lock_func, qemu_mutex_lock_impl);
    qatomic_set(&qemu_cond_wait_func, qemu_cond_wait_impl);
    qatomic_set(&qemu_cond_timedwait_func, qemu_cond_timedwait_impl);
}

void lock_counts_print(void)
{
    size_t i;

    for (i = 0; i < ARRAY_SIZE(locks); i++) {
        printf(", \"lock_%s\": {\"taken\": %" PRIu64 ", \"contended\": %"
               PRIu64 ", \"woken\": %" PRIu64 "}", locks[i].name,
               locks[i].taken, locks[i].contended, locks[i].woken);
    }
}

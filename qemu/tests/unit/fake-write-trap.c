/*
 * A write trap that stops nobody, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "fake-write-trap.h"

FakeTrap fake_trap;

static size_t page_of(void *host)
{
    return ((uint8_t *)host - fake_trap.start) / FAKE_PAGE_SIZE;
}

static WriteTrap *fake_new(void *start, size_t size, WriteTrapFaultFn *fault,
                           void *opaque, Error **errp)
{
    if (fake_trap.fail_new) {
        error_setg(errp, "The host does not allow it");
        return NULL;
    }
    fake_trap.common.ops = &fake_trap_ops;
    fake_trap.common.max_islands = fake_trap.max_islands ?: SIZE_MAX;
    fake_trap.start = start;
    fake_trap.size = size;
    fake_trap.fault = fault;
    fake_trap.opaque = opaque;
    /* With one more, so that each has a neighbour */
    fake_trap.pages = g_malloc0_n(size / FAKE_PAGE_SIZE + 1,
                                  sizeof(*fake_trap.pages));
    qemu_mutex_init(&fake_trap.lock);
    return &fake_trap.common;
}

static bool fake_add(WriteTrap *trap, void *host, size_t size, Error **errp)
{
    size_t first = page_of(host), i;
    QEMU_LOCK_GUARD(&fake_trap.lock);

    if (++fake_trap.adds == fake_trap.fail_add) {
        error_setg(errp, "The host cannot trap writes to it");
        return false;
    }
    g_assert_cmpuint(first + size / FAKE_PAGE_SIZE, <=,
                     fake_trap.size / FAKE_PAGE_SIZE);
    for (i = 0; i < size / FAKE_PAGE_SIZE; i++) {
        g_assert_cmpint(fake_trap.pages[first + i], ==, UNKNOWN);
        fake_trap.pages[first + i] = ADDED;
    }
    return true;
}

static void assert_added(void *host, size_t size)
{
    size_t first = page_of(host), i;

    for (i = 0; i < size / FAKE_PAGE_SIZE; i++) {
        g_assert_cmpint(fake_trap.pages[first + i], ==, ADDED);
    }
}

static void fake_prepare(WriteTrap *trap, void *host)
{
    size_t n = fake_trap.num_prepared++;

    assert_added(host, FAKE_PAGE_SIZE);
    g_assert_cmpuint(n, <, ARRAY_SIZE(fake_trap.prepared));
    fake_trap.prepared[n] = host;
}

static void count_islands(void)
{
    size_t i;

    fake_trap.islands = 0;
    for (i = 0; i < fake_trap.size / FAKE_PAGE_SIZE; i++) {
        fake_trap.islands += fake_trap.pages[i] == RELEASED &&
                             fake_trap.pages[i + 1] != RELEASED;
    }
}

static bool fake_arm(WriteTrap *trap, void *host, size_t size, Error **errp)
{
    bool fails = ++fake_trap.arms == fake_trap.fail_arm;
    size_t first = page_of(host), i;

    if (fake_trap.before_arm) {
        fake_trap.before_arm(host, size);
    }

    QEMU_LOCK_GUARD(&fake_trap.lock);
    if (!fake_trap.arms_again) {
        assert_added(host, size);
    }
    for (i = 0; i < size / FAKE_PAGE_SIZE / (fails ? 2 : 1); i++) {
        g_assert_cmpint(fake_trap.pages[first + i], !=, UNKNOWN);
        fake_trap.num_armed += fake_trap.pages[first + i] != ARMED;
        fake_trap.pages[first + i] = ARMED;
    }
    if (fake_trap.arms_again) {
        count_islands();
    }
    if (fails) {
        error_setg(errp, "The host cannot protect it");
    }
    return !fails;
}

static int fake_release(WriteTrap *trap, void *host, size_t size)
{
    size_t first = page_of(host);
    size_t end = first + size / FAKE_PAGE_SIZE;
    size_t i, twice = 0;

    if (fake_trap.before_release) {
        fake_trap.before_release(host, size);
    }

    QEMU_LOCK_GUARD(&fake_trap.lock);
    if (fake_trap.fail_release &&
        ((first > 0 && fake_trap.pages[first - 1] != UNKNOWN) ||
         fake_trap.pages[end] != UNKNOWN)) {
        return -ENOMEM;
    }
    fake_trap.releases++;
    fake_trap.last_host = host;
    fake_trap.last_size = size;

    for (i = first; i < end; i++) {
        twice += fake_trap.pages[i] == RELEASED;
        fake_trap.num_armed -= fake_trap.pages[i] == ARMED;
        fake_trap.pages[i] = RELEASED;
    }
    fake_trap.twice += twice;
    if (twice) {
        count_islands();
    } else {
        fake_trap.islands++;
        fake_trap.islands -= first > 0 &&
                             fake_trap.pages[first - 1] == RELEASED;
        fake_trap.islands -= fake_trap.pages[end] == RELEASED;
    }
    fake_trap.peak_islands = MAX(fake_trap.peak_islands, fake_trap.islands);
    return 0;
}

static void fake_free(WriteTrap *trap)
{
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    qemu_mutex_destroy(&fake_trap.lock);
    g_free(fake_trap.pages);
    memset(&fake_trap, 0, sizeof(fake_trap));
}

const WriteTrapOps fake_trap_ops = {
    .name = "fake",
    .in_thread = true,
    .arms_untouched = true,
    .new = fake_new,
    .add = fake_add,
    .prepare = fake_prepare,
    .arm = fake_arm,
    .release = fake_release,
    .free = fake_free,
};

bool fake_armed(void *host)
{
    QEMU_LOCK_GUARD(&fake_trap.lock);

    return fake_trap.pages[page_of(host)] == ARMED;
}

bool fake_write(void *host)
{
    if (!fake_armed(host)) {
        return true;
    }
    if (!fake_trap.fault(host, fake_trap.opaque)) {
        return false;
    }
    /* Else it would be stopped again, and again */
    g_assert_false(fake_armed(host));
    return true;
}

static WriteTrap *fake_existing_new(void *start, size_t size,
                                    WriteTrapFaultFn *fault, void *opaque,
                                    Error **errp)
{
    WriteTrap *trap = fake_new(start, size, fault, opaque, errp);

    trap->ops = &fake_trap_existing_ops;
    return trap;
}

const WriteTrapOps fake_trap_existing_ops = {
    .name = "fake-existing",
    .in_thread = true,
    .new = fake_existing_new,
    .add = fake_add,
    .arm = fake_arm,
    .release = fake_release,
    .free = fake_free,
};

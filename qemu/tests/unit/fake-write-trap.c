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

static bool fake_arm(WriteTrap *trap, void *host, size_t size, Error **errp)
{
    size_t first = page_of(host), i;
    QEMU_LOCK_GUARD(&fake_trap.lock);

    if (++fake_trap.arms == fake_trap.fail_arm) {
        error_setg(errp, "The host cannot protect it");
        return false;
    }
    g_assert_cmpuint(first + size / FAKE_PAGE_SIZE, <=,
                     fake_trap.size / FAKE_PAGE_SIZE);
    for (i = 0; i < size / FAKE_PAGE_SIZE; i++) {
        fake_trap.pages[first + i] = ARMED;
        fake_trap.num_armed++;
    }
    return true;
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
        ((first > 0 && fake_trap.pages[first - 1] != NEVER_ARMED) ||
         fake_trap.pages[end] != NEVER_ARMED)) {
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
    .new = fake_new,
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

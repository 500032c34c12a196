/*
 * Unit tests for the RAM of a background snapshot: what it asks of its trap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "fake-write-trap.h"
#include "snapshot-ram-helpers.h"

/* How long nobody waits in a test that succeeds */
#define LONG_MS 60000

static int page_state(uint8_t *host)
{
    return fake_trap.pages[(host - fake_trap.start) / PAGE_SIZE];
}

static void test_prepare(void)
{
    static const struct {
        size_t first;
        size_t num_pages;
        bool writable;
        bool shared;
        bool file;
    } blocks[] = {
        { 70, 5, true, false, true },
        { 0, 10, true, false, false },
        { 60, 5, true, true, false },
        { 20, 10, false, false, false },
        { 40, 10, true, true, true },
        { 80, 5, false, false, true },
    };
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    int fd = open("/dev/zero", O_RDONLY);
    size_t i;

    g_assert_cmpint(fd, >=, 0);
    for (i = 0; i < ARRAY_SIZE(blocks); i++) {
        test_ram_add_like(t, host + blocks[i].first * PAGE_SIZE,
                          blocks[i].num_pages, (SnapshotBlockInfo) {
            .host_page_size = PAGE_SIZE,
            .writable = blocks[i].writable,
            .shared = blocks[i].shared,
            .fd = blocks[i].file ? fd : -1,
        });
    }
    snapshot_ram_set_trap(t->ram, &fake_trap_ops, &error_abort);
    g_assert_cmpint(fake_trap.adds, ==, 4);
    g_assert_cmpint(fake_trap.arms, ==, 0);

    /* Private ones, in the order of their addresses */
    g_assert_cmpuint(fake_trap.num_prepared, ==, 2);
    g_assert_true(fake_trap.prepared[0] == host);
    g_assert_true(fake_trap.prepared[1] == host + 70 * PAGE_SIZE);

    snapshot_ram_arm(t->ram, &error_abort);
    g_assert_cmpint(fake_trap.arms, ==, 4);
    g_assert_cmpuint(fake_trap.num_armed, ==, 5 + 10 + 5 + 10);
    test_ram_free(t);
    close(fd);
    test_unmap(host, 100);
}

/* Three blocks that can be written, with holes between */
static TestRAM *three_blocks(uint8_t *host)
{
    TestRAM *t = test_ram_new(64, true, LONG_MS);

    test_ram_add(t, host, 20, PAGE_SIZE, true);
    test_ram_add(t, host + 30 * PAGE_SIZE, 20, PAGE_SIZE, true);
    test_ram_add(t, host + 60 * PAGE_SIZE, 20, PAGE_SIZE, true);
    return t;
}

static void test_new_fails(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = three_blocks(host);
    Error *err = NULL;

    fake_trap.fail_new = true;
    g_assert_false(snapshot_ram_set_trap(t->ram, &fake_trap_ops, &err));
    error_free_or_abort(&err);
    g_assert_cmpint(fake_trap.adds, ==, 0);
    fake_trap.fail_new = false;

    /* Nothing is armed, and there is no trap to ask */
    snapshot_ram_stop(t->ram);
    g_assert_cmpint(fake_trap.releases, ==, 0);
    test_ram_free(t);
    test_unmap(host, 100);
}

static void test_add_fails(void)
{
    uint8_t *host = test_map(100);
    int n;

    for (n = 1; n <= 3; n++) {
        g_autofree char *name = g_strdup_printf("'block%d'", n - 1);
        TestRAM *t = three_blocks(host);
        Error *err = NULL;

        fake_trap.fail_add = n;
        g_assert_false(snapshot_ram_set_trap(t->ram, &fake_trap_ops, &err));
        g_assert_nonnull(strstr(error_get_pretty(err), name));
        error_free_or_abort(&err);
        g_assert_cmpint(fake_trap.adds, ==, n);
        g_assert_cmpuint(fake_trap.num_prepared, ==, n - 1);
        g_assert_cmpint(fake_trap.arms, ==, 0);

        snapshot_ram_stop(t->ram);
        g_assert_cmpint(fake_trap.releases, ==, 0);
        g_assert_nonnull(fake_trap.pages);
        test_ram_free(t);
        /* The trap has been freed */
        g_assert_null(fake_trap.pages);
    }
    test_unmap(host, 100);
}

static void test_arm_fails(void)
{
    uint8_t *host = test_map(100);
    int n, i;

    for (n = 1; n <= 3; n++) {
        g_autofree char *name = g_strdup_printf("'block%d'", n - 1);
        TestRAM *t = three_blocks(host);
        Error *err = NULL;

        snapshot_ram_set_trap(t->ram, &fake_trap_ops, &error_abort);
        fake_trap.fail_arm = n;
        g_assert_false(snapshot_ram_arm(t->ram, &err));
        g_assert_nonnull(strstr(error_get_pretty(err), name));
        error_free_or_abort(&err);
        g_assert_cmpint(fake_trap.arms, ==, n);

        /* Also the block that was armed in part, and no other */
        g_assert_cmpuint(fake_trap.num_armed, ==, 0);
        g_assert_cmpint(fake_trap.releases, ==, n);
        for (i = 0; i < 3; i++) {
            g_assert_cmpint(page_state(host + i * 30 * PAGE_SIZE), ==,
                            i < n ? RELEASED : ADDED);
        }
        test_ram_free(t);
    }
    test_unmap(host, 100);
}

static void test_release_fails(void)
{
    uint8_t *host = test_map(100);
    TestRAM *t = test_ram_new(64, true, LONG_MS);
    TestBlock *b = test_ram_add(t, host, 100, PAGE_SIZE, true);

    fake_trap.fail_release = true;
    test_ram_arm(t, &fake_trap_ops);
    g_assert_null(snapshot_ram_failure(t->ram));

    /* The snapshot fails, the writer goes on */
    g_assert_true(fake_write(b->host + 20 * PAGE_SIZE));
    g_assert_nonnull(snapshot_ram_failure(t->ram));
    g_assert_cmpuint(fake_trap.num_armed, ==, 0);
    g_assert_false(test_ram_next(t));
    g_assert_false(snapshot_ram_is_saved(t->ram));
    test_ram_free(t);
    test_unmap(host, 100);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/snapshot-ram/trap/prepare", test_prepare);
    g_test_add_func("/snapshot-ram/trap/new-fails", test_new_fails);
    g_test_add_func("/snapshot-ram/trap/add-fails", test_add_fails);
    g_test_add_func("/snapshot-ram/trap/arm-fails", test_arm_fails);
    g_test_add_func("/snapshot-ram/trap/release-fails", test_release_fails);
    return g_test_run();
}

/*
 * Unit tests for how much memory the process's cgroups leave it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "../migration/memory-room.h"

typedef struct File {
    const char *path;
    const char *text;
} File;

static const struct {
    const char *name;
    const char *cgroup;
    File files[10];
    uint64_t expected;
} cases[] = {
    { "none", NULL, {}, UINT64_MAX },
    { "no-limit", "0::/a\n", {
        { "a/memory.max", "max\n" },
        { "a/memory.high", "max\n" },
        { "a/memory.current", "1000\n" },
    }, UINT64_MAX },
    { "v2", "0::/a/b.scope\n", {
        { "a/b.scope/memory.max", "5000\n" },
        { "a/b.scope/memory.high", "max\n" },
        { "a/b.scope/memory.current", "3000\n" },
        { "a/b.scope/memory.stat", "anon 2200\nfile 900\ninactive_file 500\n"
                                   "active_file 200\nfile_dirty 77\n" },
    }, 2700 },
    { "v2-high", "0::/a\n", {
        { "a/memory.max", "5000\n" },
        { "a/memory.high", "4000\n" },
        { "a/memory.current", "3000\n" },
    }, 1000 },
    /* That around it leaves less, and the innermost has no file of its own */
    { "v2-outer", "0::/a/b/c\n", {
        { "a/b/memory.max", "9000\n" },
        { "a/b/memory.current", "1000\n" },
        { "a/memory.max", "6000\n" },
        { "a/memory.current", "5500\n" },
    }, 500 },
    { "v2-root", "0::/\n", {
        { "memory.max", "6000\n" },
        { "memory.current", "5000\n" },
    }, 1000 },
    { "v2-over", "0::/a\n", {
        { "a/memory.max", "1000\n" },
        { "a/memory.current", "1001\n" },
    }, 0 },
    { "v1", "12:cpu,cpuacct:/x\n4:hugetlb,memory:/a\n0::/\n", {
        { "memory/a/memory.limit_in_bytes", "5000\n" },
        { "memory/a/memory.usage_in_bytes", "3000\n" },
        { "memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 100\n"
                                  "total_active_file 10\n" },
        { "memory/memory.limit_in_bytes", "9223372036854771712\n" },
    }, 2110 },
};

static void test_case(const void *opaque)
{
    size_t i = GPOINTER_TO_SIZE(opaque);
    g_autofree char *root = g_dir_make_tmp("memory-room-XXXXXX", NULL);
    g_autofree char *cgroup = g_build_filename(root, "cgroup", NULL);
    g_autofree char *command = NULL;
    const File *file;

    g_assert_nonnull(root);
    if (cases[i].cgroup) {
        g_file_set_contents(cgroup, cases[i].cgroup, -1, NULL);
    }
    for (file = cases[i].files; file->path; file++) {
        g_autofree char *path = g_build_filename(root, file->path, NULL);
        g_autofree char *dir = g_path_get_dirname(path);

        g_assert_cmpint(g_mkdir_with_parents(dir, 0700), ==, 0);
        g_assert_true(g_file_set_contents(path, file->text, -1, NULL));
    }
    g_assert_cmpuint(memory_room_at(cgroup, root), ==, cases[i].expected);
    command = g_strdup_printf("rm -r '%s'", root);
    g_assert_cmpint(system(command), ==, 0);
}

int main(int argc, char **argv)
{
    size_t i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *path = g_strdup_printf("/memory-room/%s",
                                                cases[i].name);

        g_test_add_data_func(path, GSIZE_TO_POINTER(i), test_case);
    }
    return g_test_run();
}

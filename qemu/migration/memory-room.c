/*
 * How much memory the process's cgroups leave it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "memory-room.h"

/*
 * What a controller's files are called; see admin-guide/cgroup-v2.rst and
 * admin-guide/cgroup-v1/memory.rst in Linux's documentation
 */
typedef struct Version {
    const char *mount;
    const char *limits[2];
    const char *usage;
    const char *file_pages[2];
} Version;

static const Version version_1 = {
    "memory", { "memory.limit_in_bytes" }, "memory.usage_in_bytes",
    { "total_inactive_file ", "total_active_file " },
};

static const Version version_2 = {
    "", { "memory.max", "memory.high" }, "memory.current",
    { "inactive_file ", "active_file " },
};

/* Returns a file's number, or @missing if there is none in it */
static uint64_t read_number(const char *dir, const char *name,
                            uint64_t missing)
{
    g_autofree char *path = g_build_filename(dir, name, NULL);
    g_autofree char *text = NULL;
    uint64_t number;

    if (g_file_get_contents(path, &text, NULL, NULL) &&
        qemu_strtou64(g_strstrip(text), NULL, 10, &number) == 0) {
        return number;
    }
    return missing;
}

/* Returns the sum of two lines of memory.stat */
static uint64_t read_file_pages(const char *dir, const Version *v)
{
    g_autofree char *path = g_build_filename(dir, "memory.stat", NULL);
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    uint64_t sum = 0;
    int i, j;

    if (!g_file_get_contents(path, &text, NULL, NULL)) {
        return 0;
    }
    lines = g_strsplit(text, "\n", -1);
    for (i = 0; lines[i]; i++) {
        for (j = 0; j < ARRAY_SIZE(v->file_pages); j++) {
            const char *value;
            uint64_t number;

            if (strstart(lines[i], v->file_pages[j], &value) &&
                qemu_strtou64(value, NULL, 10, &number) == 0) {
                sum += number;
            }
        }
    }
    return sum;
}

/* What one cgroup leaves */
static uint64_t room_in(const char *dir, const Version *v)
{
    uint64_t limit = UINT64_MAX;
    uint64_t usage = read_number(dir, v->usage, 0);
    int i;

    for (i = 0; i < ARRAY_SIZE(v->limits) && v->limits[i]; i++) {
        limit = MIN(limit, read_number(dir, v->limits[i], UINT64_MAX));
    }
    if (limit == UINT64_MAX) {
        return limit;
    }
    usage -= MIN(usage, read_file_pages(dir, v));
    return limit - MIN(limit, usage);
}

/* What a cgroup and all those around it leave */
static uint64_t room_below(const char *root, const char *path,
                           const Version *v)
{
    g_autofree char *mount = g_build_filename(root, v->mount, NULL);
    g_autofree char *place = g_strdup(path);
    uint64_t room = UINT64_MAX;

    for (;;) {
        g_autofree char *dir = g_build_filename(mount, place, NULL);
        char *slash = strrchr(place, '/');

        room = MIN(room, room_in(dir, v));
        if (!slash) {
            return room;
        }
        *slash = '\0';
    }
}

uint64_t memory_room_at(const char *proc_self_cgroup, const char *sys_fs_cgroup)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    uint64_t room = UINT64_MAX;
    int i;

    if (!g_file_get_contents(proc_self_cgroup, &text, NULL, NULL)) {
        return room;
    }
    lines = g_strsplit(text, "\n", -1);
    for (i = 0; lines[i]; i++) {
        /* Hierarchy, controllers, path */
        g_auto(GStrv) fields = g_strsplit(lines[i], ":", 3);
        g_auto(GStrv) controllers = NULL;

        if (g_strv_length(fields) != 3) {
            continue;
        }
        controllers = g_strsplit(fields[1], ",", -1);
        if (!strcmp(fields[0], "0")) {
            room = MIN(room, room_below(sys_fs_cgroup, fields[2], &version_2));
        } else if (g_strv_contains((const char *const *)controllers,
                                   "memory")) {
            room = MIN(room, room_below(sys_fs_cgroup, fields[2], &version_1));
        }
    }
    return room;
}

uint64_t memory_room(void)
{
    return memory_room_at("/proc/self/cgroup", "/sys/fs/cgroup");
}

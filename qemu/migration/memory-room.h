/*
 * How much memory the process's cgroups leave it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_MEMORY_ROOM_H
#define MIGRATION_MEMORY_ROOM_H

/**
 * memory_room: how much more memory may this process use?
 *
 * Beyond that, the host's kernel kills it.  Memory for the contents of files
 * does not count, as the kernel can take it back.  Looks at all cgroups that
 * the process is in, of version 1 or 2.
 *
 * Returns: bytes, or UINT64_MAX if there is no limit
 */
uint64_t memory_room(void);

/* The same for what the files in place of these two tell; for tests */
uint64_t memory_room_at(const char *proc_self_cgroup,
                        const char *sys_fs_cgroup);

#endif

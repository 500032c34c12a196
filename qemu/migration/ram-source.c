/*
 * Reading RAM without having the host allocate any
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "ram-source.h"

#ifdef CONFIG_LINUX
#include <sys/vfs.h>

/* From linux/magic.h; memfds are files of it, too */
#define TMPFS_MAGIC 0x01021994
#endif

void ram_source_init(RAMSource *source, HostPages *pages)
{
#ifdef CONFIG_LINUX
    struct statfs fs;

    /* Others may tell late what has been written */
    source->has_holes = source->shared && source->fd >= 0 &&
                        RETRY_ON_EINTR(fstatfs(source->fd, &fs)) == 0 &&
                        fs.f_type == TMPFS_MAGIC;
#endif
    source->pages = pages;
    if (pages && !source->shared) {
        source->exist = bitmap_new(source->size / source->unit_size);
    }
}

void ram_source_cleanup(RAMSource *source)
{
    g_free(source->exist);
}

bool ram_source_look_part(RAMSource *source, size_t first, size_t end,
                          unsigned long *huge, Error **errp)
{
    /* Of shared memory, what is not in the page tables may exist in the file */
    if (!source->pages || (source->shared && !huge)) {
        return true;
    }
    return host_pages_find_part(source->pages, source->host,
                                first * source->unit_size,
                                (end - first) * source->unit_size,
                                source->unit_size, source->hugetlb,
                                source->exist, huge, errp);
}

bool ram_source_look(RAMSource *source, unsigned long *huge, Error **errp)
{
    return ram_source_look_part(source, 0, source->size / source->unit_size,
                                huge, errp);
}

RAMSourceKind ram_source_find(const RAMSource *source, size_t unit)
{
    if (source->exist) {
        if (test_bit(unit, source->exist)) {
            return RAM_SOURCE_MEMORY;
        }
        return source->fd >= 0 ? RAM_SOURCE_FILE : RAM_SOURCE_ZERO;
    }
    if (source->pages && source->fd >= 0 &&
        !host_pages_present(source->pages,
                            source->host + unit * source->unit_size)) {
        return RAM_SOURCE_FILE;
    }
    return RAM_SOURCE_MEMORY;
}

size_t ram_source_zero_units(const RAMSource *source, size_t unit)
{
    size_t num_units = MIN(source->size, unit * source->unit_size +
                                         RAM_SOURCE_MAX_ZERO) /
                       source->unit_size;

    if (source->exist && source->fd < 0) {
        return find_next_bit(source->exist, num_units, unit) - unit;
    }
#ifdef CONFIG_LINUX
    if (source->has_holes) {
        off_t start = source->fd_offset + unit * source->unit_size;
        off_t data = lseek(source->fd, start, SEEK_DATA);

        if (data < 0) {
            return errno == ENXIO ? num_units - unit : 0;
        }
        return MIN((data - start) / source->unit_size, num_units - unit);
    }
#endif
    return 0;
}

bool ram_source_has_no_hole(const RAMSource *source, size_t first, size_t end)
{
#ifdef CONFIG_LINUX
    if (source->has_holes) {
        off_t start = source->fd_offset + first * source->unit_size;
        off_t hole = lseek(source->fd, start, SEEK_HOLE);

        return hole - start >= (off_t)((end - first) * source->unit_size);
    }
#endif
    return false;
}

void ram_source_read(const RAMSource *source, size_t offset, void *buf,
                     size_t size)
{
#ifdef CONFIG_LINUX
    if (RETRY_ON_EINTR(pread(source->fd, buf, size,
                             source->fd_offset + offset)) == size) {
        return;
    }
#endif
    memcpy(buf, source->host + offset, size);
}

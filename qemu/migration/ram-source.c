/*
 * Reading RAM without having the host allocate any
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "ram-source.h"

/* See Documentation/admin-guide/mm/pagemap.rst in Linux */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_SWAPPED (UINT64_C(1) << 62)
#define PAGEMAP_UFFD_WP (UINT64_C(1) << 57)

void ram_source_init(RAMSource *source)
{
    source->pagemap = -1;
#ifdef CONFIG_LINUX
    if (source->fd >= 0) {
        source->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    }
#endif
}

void ram_source_cleanup(RAMSource *source)
{
    if (source->pagemap >= 0) {
        close(source->pagemap);
    }
}

bool ram_source_in_file(const RAMSource *source, size_t offset)
{
#ifdef CONFIG_LINUX
    off_t file_offset = source->fd_offset + offset;
    uintptr_t page;
    uint64_t entry;

    if (source->pagemap < 0) {
        return false;
    }
    page = (uintptr_t)(source->host + offset) / qemu_real_host_page_size();
    if (RETRY_ON_EINTR(pread(source->pagemap, &entry, sizeof(entry),
                             page * sizeof(entry))) != sizeof(entry)) {
        return false;
    }
    if (entry & PAGEMAP_PRESENT) {
        return false;
    }
    if (source->shared || !(entry & PAGEMAP_SWAPPED)) {
        return true;
    }
    /*
     * A private page that was written and swapped out is in no file.  One that
     * userfaultfd protects though it does not exist looks the same; but only
     * where nobody has written, the file may have a hole.
     */
    return (entry & PAGEMAP_UFFD_WP) &&
           lseek(source->fd, file_offset, SEEK_DATA) != file_offset;
#else
    return false;
#endif
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

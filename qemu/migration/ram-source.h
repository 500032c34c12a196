/*
 * Reading RAM without having the host allocate any
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Memory of a file (memfd, tmpfs, hugetlbfs) that nobody has touched is a hole
 * in the file.  To read it through its mapping fills the hole: an idle guest's
 * RAM would be allocated by taking a snapshot of it.  To read the file does
 * not.  Anonymous memory needs no such care, as all its untouched pages share
 * one page of zeroes.
 */
#ifndef MIGRATION_RAM_SOURCE_H
#define MIGRATION_RAM_SOURCE_H

typedef struct RAMSource {
    uint8_t *host;
    bool shared;
    /* The file that is mapped at @host, or -1, and where in it */
    int fd;
    uint64_t fd_offset;

    /* private */
    int pagemap;
} RAMSource;

/* Get ready to read; the other fields are set.  The file must stay open. */
void ram_source_init(RAMSource *source);
void ram_source_cleanup(RAMSource *source);

/**
 * ram_source_in_file: must a host page be read from the file?
 *
 * Any thread, also in signal context; as must be ram_source_read().
 *
 * @offset: of the host page, in bytes from the start
 *
 * Returns: false if to read it through its mapping allocates nothing
 */
bool ram_source_in_file(const RAMSource *source, size_t offset);

/**
 * ram_source_read: copy from the file, or from its mapping if that fails
 *
 * @buf: is filled with @size bytes, which are all of one host page
 */
void ram_source_read(const RAMSource *source, size_t offset, void *buf,
                     size_t size);

#endif

/*
 * Reading RAM without having the host allocate any
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * To read memory that nobody has touched may allocate it: a hole of a file
 * (memfd, tmpfs, hugetlbfs) that is read through its mapping is filled, and
 * some hosts have no page of zeroes that untouched anonymous memory could
 * share.  And it takes time.  So an idle guest's RAM would be allocated by
 * taking a snapshot of it.  What does not exist is not read.
 */
#ifndef MIGRATION_RAM_SOURCE_H
#define MIGRATION_RAM_SOURCE_H

#include "qemu/units.h"
#include "host-pages.h"

typedef struct RAMSource {
    uint8_t *host;
    /* Bytes, multiples of the page size of the memory */
    size_t size;
    size_t unit_size;
    bool shared;
    bool hugetlb;
    /* The file that is mapped at @host, or -1, and where in it */
    int fd;
    uint64_t fd_offset;

    /* private: a bit for each unit that exists; NULL if that is not known */
    unsigned long *exist;
    HostPages *pages;
    bool has_holes;
} RAMSource;

#define RAM_SOURCE_MAX_ZERO (64 * MiB)

typedef enum RAMSourceKind {
    RAM_SOURCE_MEMORY,          /* read the memory */
    RAM_SOURCE_FILE,            /* ram_source_read() it from the file */
    RAM_SOURCE_ZERO,            /* it is all zeroes, and is not to be read */
} RAMSourceKind;

/*
 * Get ready; the other fields are set.  The file must stay open, and @pages
 * stay.  Without @pages, all of the memory exists.
 */
void ram_source_init(RAMSource *source, HostPages *pages);
void ram_source_cleanup(RAMSource *source);

/**
 * ram_source_look: find out what exists
 *
 * To be called while nobody touches the memory, and before it is protected.
 * The answers of the other functions are about that moment, and hold for as
 * long as nobody has written to the unit.
 *
 * @huge: see host_pages_find()
 *
 * Returns: true, or false with @errp set
 */
bool ram_source_look(RAMSource *source, unsigned long *huge, Error **errp);

/* The same for the units from @first to @end; @huge is of all of the memory */
bool ram_source_look_part(RAMSource *source, size_t first, size_t end,
                          unsigned long *huge, Error **errp);

/**
 * ram_source_find: where the contents of a unit are
 *
 * Any thread, also in signal context; as must be ram_source_read().
 *
 * @unit: its number
 */
RAMSourceKind ram_source_find(const RAMSource *source, size_t unit);

/**
 * ram_source_zero_units: how many units, from one on, do not exist
 *
 * Cheap also for many; no more than RAM_SOURCE_MAX_ZERO bytes.  May be too few,
 * but not if @unit is anonymous.
 */
size_t ram_source_zero_units(const RAMSource *source, size_t unit);

/**
 * ram_source_has_no_hole: does each of some units exist in the file?
 *
 * Of shared memory, and as it is now.  False if that is not known.
 */
bool ram_source_has_no_hole(const RAMSource *source, size_t first, size_t end);

/**
 * ram_source_read: copy from the file, or from its mapping if that fails
 *
 * @offset: in bytes from the start
 * @buf: is filled with @size bytes, which are all of one unit
 */
void ram_source_read(const RAMSource *source, size_t offset, void *buf,
                     size_t size);

#endif

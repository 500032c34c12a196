/*
 * The kinds of memory that a guest's RAM may be made of, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef TESTS_MEMORY_KINDS_H
#define TESTS_MEMORY_KINDS_H

typedef struct MemoryKind {
    const char *name;
    enum {
        MEMORY_ANONYMOUS,
        MEMORY_MEMFD,
        MEMORY_HUGETLB,
        MEMORY_TMPFS,
        MEMORY_REGULAR,         /* a file on a disk */
    } backing;
    bool shared;
    enum {
        /* Of private memory of a file, odd pages; the others are the file's */
        MEMORY_WRITTEN,
        MEMORY_UNTOUCHED,
        /* Written, and in transparent huge pages */
        MEMORY_HUGE,
        /* Written, and the first half is not in memory */
        MEMORY_SWAPPED,
    } state;
} MemoryKind;

/* Ends with one that has no name */
extern const MemoryKind memory_kinds[];

typedef struct Memory {
    const MemoryKind *kind;
    uint8_t *host;
    size_t page_size;           /* bytes, in which the host can protect it */
    size_t num_pages;
    size_t size;                /* bytes */
    int fd;                     /* -1 if anonymous */
    uint64_t fd_offset;         /* not 0, unless anonymous */
} Memory;

/**
 * memory_map: get memory of a kind
 *
 * Returns: true, or false with @errp set if this host has none now
 */
bool memory_map(Memory *m, const MemoryKind *kind, Error **errp);
void memory_unmap(Memory *m);

/* The same; without memory, the test that runs is skipped and told why */
bool memory_map_or_skip(Memory *m, const MemoryKind *kind);

/* Returns: whether there is memory of a kind */
bool memory_available(const MemoryKind *kind);

/* GTestDataFunc: the one test of a kind that this host has none of */
void memory_skip(const void *kind);

/* Returns: what each byte of a page is, as long as nobody writes to it */
uint8_t memory_expected(const Memory *m, size_t page);

/* Assert that all bytes of a page are as expected */
void memory_check_page(const Memory *m, size_t page, const uint8_t *data);

/* Returns: how many bytes the host has allocated for it, in its file as well */
size_t memory_allocated(const Memory *m);

#endif

/*
 * What the host's page tables say of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Linux only, and where /proc is mounted.
 */
#ifndef MIGRATION_HOST_PAGES_H
#define MIGRATION_HOST_PAGES_H

typedef struct HostPages HostPages;

/**
 * host_pages_new: get ready to ask
 *
 * @scan: use what Linux has from 6.7 on; false is for tests
 *
 * Returns: what to ask, or NULL with @errp set if this host tells nothing
 */
HostPages *host_pages_new(bool scan, Error **errp);
void host_pages_free(HostPages *pages);

/**
 * host_pages_prepare: take note of which mappings have huge pages
 *
 * Before Linux 6.7, for host_pages_find().  Takes 10 ms for each GiB or so.
 */
void host_pages_prepare(HostPages *pages);

/* Returns: whether the host tells which pages are huge, as from Linux 6.7 on */
bool host_pages_know_huge(const HostPages *pages);

/**
 * host_pages_huge_size: of what size transparent huge pages are
 *
 * Returns: bytes, a power of two; 0 if the host has none
 */
size_t host_pages_huge_size(void);

/**
 * host_pages_find: which pages of a range exist, in RAM or swapped out
 *
 * The answer is right for as long as nobody touches the memory.  Memory that
 * is shared may exist without being in the page tables, and memory that
 * userfaultfd protects seems to exist though it does not: ask before.
 *
 * @host, @size: the range, multiples of @unit_size
 * @unit_size: bytes, of which size the answers are
 * @hugetlb: whether it is memory of hugetlbfs; then @unit_size is its page size
 * @exist: a bit for each unit, which is set if it exists; others stay.  Or
 *         NULL.
 * @huge: a bit for each aligned range of host_pages_huge_size() bytes, counted
 *        from the one that holds @host; is set if it is one huge page.  Or
 *        NULL.  Linux 6.7 tells; before, those are taken for huge that exist
 *        as a whole, in a mapping in which host_pages_prepare() has seen any.
 *
 * Returns: true, or false with @errp set
 */
bool host_pages_find(HostPages *pages, void *host, size_t size,
                     size_t unit_size, bool hugetlb, unsigned long *exist,
                     unsigned long *huge, Error **errp);

/*
 * The same for @size bytes from @offset on.  Bits are counted from @host on, as
 * if all were asked for.
 */
bool host_pages_find_part(HostPages *pages, void *host, size_t offset,
                          size_t size, size_t unit_size, bool hugetlb,
                          unsigned long *exist, unsigned long *huge,
                          Error **errp);

/**
 * host_pages_present: is a page of shared memory in the page tables?
 *
 * Any thread, also in signal context.
 *
 * Returns: true if it can be read without taking memory from the host, also
 * if that is not known
 */
bool host_pages_present(const HostPages *pages, const void *host);

/* Returns: whether host_pages_collapse() is possible, as from Linux 6.1 on */
bool host_pages_can_collapse(void);

/**
 * host_pages_collapse: have the host make an aligned range a huge page
 *
 * Waits for the host to find memory and to copy, and tries again for some
 * milliseconds if others use a page of it at the moment.  The range must exist
 * as a whole, or the host would take memory for what does not.
 *
 * Returns: 0, or -errno
 */
int host_pages_collapse(void *host, size_t huge_size);

#endif

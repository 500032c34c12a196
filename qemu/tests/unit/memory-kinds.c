/*
 * The kinds of memory that a guest's RAM may be made of, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <linux/magic.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/vfs.h>
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/mmap-alloc.h"
#include "qemu/units.h"
#include "memory-kinds.h"

/* Not in each libc yet */
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

#define NUM_PAGES 96
#define NUM_HUGE_PAGES 4
#define HUGE_SIZE (2 * MiB)

/* Pages of the file before what is mapped; they hold other data */
#define SKIPPED_PAGES 2

const MemoryKind memory_kinds[] = {
    { "anonymous", MEMORY_ANONYMOUS, false, MEMORY_WRITTEN },
    { "anonymous-untouched", MEMORY_ANONYMOUS, false, MEMORY_UNTOUCHED },
    { "anonymous-huge", MEMORY_ANONYMOUS, false, MEMORY_HUGE },
    { "anonymous-swapped", MEMORY_ANONYMOUS, false, MEMORY_SWAPPED },
    { "memfd-shared", MEMORY_MEMFD, true, MEMORY_WRITTEN },
    { "memfd-shared-untouched", MEMORY_MEMFD, true, MEMORY_UNTOUCHED },
    { "memfd-shared-swapped", MEMORY_MEMFD, true, MEMORY_SWAPPED },
    { "memfd-private", MEMORY_MEMFD, false, MEMORY_WRITTEN },
    { "memfd-private-untouched", MEMORY_MEMFD, false, MEMORY_UNTOUCHED },
    { "memfd-private-swapped", MEMORY_MEMFD, false, MEMORY_SWAPPED },
    { "hugetlb-shared", MEMORY_HUGETLB, true, MEMORY_WRITTEN },
    { "hugetlb-shared-untouched", MEMORY_HUGETLB, true, MEMORY_UNTOUCHED },
    { "hugetlb-private", MEMORY_HUGETLB, false, MEMORY_WRITTEN },
    { "hugetlb-private-untouched", MEMORY_HUGETLB, false, MEMORY_UNTOUCHED },
    { "tmpfs-private", MEMORY_TMPFS, false, MEMORY_WRITTEN },
    { "regular-shared", MEMORY_REGULAR, true, MEMORY_WRITTEN },
    { "regular-private", MEMORY_REGULAR, false, MEMORY_WRITTEN },
    { }
};

/* Returns a new file in @dir without a name, or -1 with @errp set */
static int open_file(const char *dir, bool want_tmpfs, Error **errp)
{
    g_autofree char *name = g_build_filename(dir, "memory-XXXXXX", NULL);
    int fd = g_mkstemp(name);
    struct statfs fs;

    if (fd < 0) {
        error_setg_errno(errp, errno, "Cannot create a file in %s", dir);
        return -1;
    }
    unlink(name);
    g_assert_cmpint(fstatfs(fd, &fs), ==, 0);
    if ((fs.f_type == TMPFS_MAGIC) != want_tmpfs) {
        error_setg(errp, "%s is %s tmpfs", dir, want_tmpfs ? "no" : "a");
        close(fd);
        return -1;
    }
    return fd;
}

static bool open_backing(Memory *m, Error **errp)
{
    m->page_size = qemu_real_host_page_size();
    m->num_pages = NUM_PAGES;
    switch (m->kind->backing) {
    case MEMORY_ANONYMOUS:
        m->fd = -1;
        if (m->kind->state == MEMORY_HUGE) {
            m->num_pages = 2 * HUGE_SIZE / m->page_size;
        }
        return true;
    case MEMORY_MEMFD:
        m->fd = memfd_create("memory", MFD_CLOEXEC);
        break;
    case MEMORY_HUGETLB:
        m->fd = memfd_create("memory", MFD_CLOEXEC | MFD_HUGETLB |
                                       MFD_HUGE_2MB);
        if (m->fd >= 0) {
            m->page_size = qemu_fd_getpagesize(m->fd);
            m->num_pages = NUM_HUGE_PAGES;
        }
        break;
    case MEMORY_TMPFS:
        m->fd = open_file("/dev/shm", true, errp);
        return m->fd >= 0;
    case MEMORY_REGULAR:
        m->fd = open_file(g_test_get_dir(G_TEST_BUILT), false, errp);
        return m->fd >= 0;
    }
    if (m->fd < 0) {
        error_setg_errno(errp, errno, "Cannot create a memfd");
    }
    return m->fd >= 0;
}

/* Fill a written file, and what comes before the part to be mapped */
static bool fill_file(Memory *m, Error **errp)
{
    size_t size = m->fd_offset + m->size, i;
    uint8_t *file;

    g_assert_cmpint(ftruncate(m->fd, size), ==, 0);
    file = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (file == MAP_FAILED) {
        error_setg_errno(errp, errno, "Cannot map %zu pages of %zu bytes (see "
                         "vm.nr_hugepages)", m->num_pages + SKIPPED_PAGES,
                         m->page_size);
        return false;
    }
    memset(file, 0xee, m->fd_offset);
    for (i = 0; i < m->num_pages && m->kind->state != MEMORY_UNTOUCHED; i++) {
        memset(file + m->fd_offset + i * m->page_size,
               memory_expected(m, i & ~1), m->page_size);
    }
    munmap(file, size);
    return true;
}

static void fill_memory(Memory *m)
{
    bool of_file = m->fd >= 0 && !m->kind->shared;
    size_t i;

    for (i = of_file ? 1 : 0; i < m->num_pages; i += of_file ? 2 : 1) {
        memset(m->host + i * m->page_size, memory_expected(m, i),
               m->page_size);
    }
}

/* Returns the sum of what /proc/self/smaps says, in bytes */
static size_t smaps_sum(const Memory *m, const char *field)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    uintptr_t start = (uintptr_t)m->host;
    bool ours = false;
    size_t sum = 0;
    int i;

    g_assert_true(g_file_get_contents("/proc/self/smaps", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (i = 0; lines[i]; i++) {
        uint64_t first, end, kib;
        const char *value;

        if (sscanf(lines[i], "%" SCNx64 "-%" SCNx64 " ", &first, &end) == 2) {
            ours = first < start + m->size && end > start;
        } else if (ours && strstart(lines[i], field, &value) &&
                   sscanf(value, "%" SCNu64, &kib) == 1) {
            sum += kib * KiB;
        }
    }
    return sum;
}

static bool make_huge(Memory *m, Error **errp)
{
    /* Whether these succeed is seen by what they do */
    madvise(m->host, m->size, MADV_HUGEPAGE);
    fill_memory(m);
    madvise(m->host, m->size, MADV_COLLAPSE);
    if (smaps_sum(m, "AnonHugePages:") != m->size) {
        error_setg(errp, "The host gives no transparent huge pages");
        return false;
    }
    return true;
}

static bool swap_out(Memory *m, Error **errp)
{
    struct sysinfo info;
    size_t i;
    int tries;

    sysinfo(&info);
    if (!info.freeswap) {
        error_setg(errp, "The host has no free swap space");
        return false;
    }
    /* What is not mapped would stay */
    for (i = 0; i < m->num_pages; i++) {
        memory_check_page(m, i, m->host + i * m->page_size);
    }
    for (tries = 0; tries < 100; tries++) {
        /* Whether this succeeds is seen by what it does, which may take long */
        madvise(m->host, m->size / 2, MADV_PAGEOUT);
        if (smaps_sum(m, "Swap:") >= m->size / 2) {
            return true;
        }
        g_usleep(10 * 1000);
    }
    error_setg(errp, "The host does not swap memory out");
    return false;
}

bool memory_map(Memory *m, const MemoryKind *kind, Error **errp)
{
    memset(m, 0, sizeof(*m));
    m->kind = kind;
    if (!open_backing(m, errp)) {
        return false;
    }
    m->size = m->num_pages * m->page_size;
    if (m->fd >= 0) {
        m->fd_offset = SKIPPED_PAGES * m->page_size;
        if (!fill_file(m, errp)) {
            goto fail;
        }
    }
    m->host = qemu_ram_mmap(m->fd, m->size, HUGE_SIZE,
                            kind->shared ? QEMU_MAP_SHARED : 0, m->fd_offset);
    if (m->host == MAP_FAILED) {
        error_setg_errno(errp, errno, "Cannot map %zu bytes", m->size);
        m->host = NULL;
        goto fail;
    }

    if (kind->state != MEMORY_HUGE) {
        /* Else the host may have more come into being than what is touched */
        madvise(m->host, m->size, MADV_NOHUGEPAGE);
    }
    switch (kind->state) {
    case MEMORY_UNTOUCHED:
        return true;
    case MEMORY_WRITTEN:
        fill_memory(m);
        return true;
    case MEMORY_HUGE:
        if (make_huge(m, errp)) {
            return true;
        }
        break;
    case MEMORY_SWAPPED:
        fill_memory(m);
        if (swap_out(m, errp)) {
            return true;
        }
        break;
    }
fail:
    memory_unmap(m);
    return false;
}

bool memory_map_or_skip(Memory *m, const MemoryKind *kind)
{
    Error *err = NULL;

    if (memory_map(m, kind, &err)) {
        return true;
    }
    g_test_skip(error_get_pretty(err));
    error_free(err);
    return false;
}

bool memory_available(const MemoryKind *kind)
{
    Memory m;

    if (!memory_map(&m, kind, NULL)) {
        return false;
    }
    memory_unmap(&m);
    return true;
}

void memory_skip(const void *kind)
{
    Memory m;

    if (memory_map_or_skip(&m, kind)) {
        memory_unmap(&m);
        g_test_skip("It was not available when the tests began");
    }
}

void memory_unmap(Memory *m)
{
    if (m->host) {
        qemu_ram_munmap(m->fd, m->host, m->size);
    }
    if (m->fd >= 0) {
        close(m->fd);
    }
}

uint8_t memory_expected(const Memory *m, size_t page)
{
    return m->kind->state == MEMORY_UNTOUCHED ? 0 : 1 + page % 199;
}

void memory_check_page(const Memory *m, size_t page, const uint8_t *data)
{
    g_assert_cmpint(data[0], ==, memory_expected(m, page));
    g_assert_cmpint(memcmp(data, data + 1, m->page_size - 1), ==, 0);
}

size_t memory_allocated(const Memory *m)
{
    struct stat st = { };

    if (m->fd >= 0) {
        g_assert_cmpint(fstat(m->fd, &st), ==, 0);
    }
    return st.st_blocks * 512 +
           (m->kind->shared ? 0 : smaps_sum(m, "Anonymous:") +
                                  smaps_sum(m, "Swap:") +
                                  smaps_sum(m, "Private_Hugetlb:"));
}

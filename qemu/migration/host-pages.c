/*
 * What the host's page tables say of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "host-pages.h"

#ifdef CONFIG_LINUX
#include <sys/ioctl.h>
#include <sys/mman.h>

#define HUGE_SIZE_PATH "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define COLLAPSE_TRIES 10

/* See Documentation/admin-guide/mm/pagemap.rst in Linux */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_SWAPPED (UINT64_C(1) << 62)

/* From include/uapi/linux/fs.h of Linux 6.7, which hosts' headers may lack */
struct page_region_v1 {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pm_scan_arg_v1 {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

#define PAGEMAP_SCAN_V1 _IOWR('f', 16, struct pm_scan_arg_v1)
#define PAGE_IS_PRESENT_V1 (1 << 3)
#define PAGE_IS_SWAPPED_V1 (1 << 4)
#define PAGE_IS_PFNZERO_V1 (1 << 5)
#define PAGE_IS_HUGE_V1 (1 << 6)

typedef struct Mapping {
    uint64_t start;
    uint64_t end;
} Mapping;

struct HostPages {
    /* /proc/self/pagemap */
    int fd;
    size_t page_size;
    size_t huge_size;
    bool can_scan;
    /* Without that: mappings with huge pages */
    GArray *with_huge;
};

/* Where a search's results go */
typedef struct Found {
    uint8_t *host;
    size_t unit_size;
    unsigned long *exist;
    uint8_t *huge_host;
    size_t huge_size;
    unsigned long *huge;
} Found;

static int pagemap_scan(const HostPages *pages, struct pm_scan_arg_v1 *arg,
                        const void *start, const void *end)
{
    arg->size = sizeof(*arg);
    arg->start = (uintptr_t)start;
    arg->end = (uintptr_t)end;
    arg->category_anyof_mask = PAGE_IS_PRESENT_V1 | PAGE_IS_SWAPPED_V1;
    arg->return_mask = PAGE_IS_PFNZERO_V1 | PAGE_IS_HUGE_V1;
    return ioctl(pages->fd, PAGEMAP_SCAN_V1, arg);
}

HostPages *host_pages_new(bool scan, Error **errp)
{
    struct pm_scan_arg_v1 arg = {};
    HostPages *pages;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (fd < 0) {
        error_setg_errno(errp, errno, "Cannot open /proc/self/pagemap, which "
                         "tells which pages of memory exist");
        return NULL;
    }
    pages = g_new0(HostPages, 1);
    pages->fd = fd;
    pages->page_size = qemu_real_host_page_size();
    pages->huge_size = host_pages_huge_size();
    pages->with_huge = g_array_new(false, false, sizeof(Mapping));
    /* Of nothing, to ask whether the kernel can */
    pages->can_scan = scan && pagemap_scan(pages, &arg, NULL, NULL) == 0;
    return pages;
}

void host_pages_free(HostPages *pages)
{
    g_array_free(pages->with_huge, true);
    close(pages->fd);
    g_free(pages);
}

size_t host_pages_huge_size(void)
{
    g_autofree char *text = NULL;
    uint64_t size;

    if (g_file_get_contents(HUGE_SIZE_PATH, &text, NULL, NULL) &&
        qemu_strtou64(g_strstrip(text), NULL, 10, &size) == 0) {
        return size;
    }
    return 0;
}

static void found(Found *f, uint8_t *start, uint8_t *end, bool huge)
{
    size_t first = (start - f->host) / f->unit_size;
    size_t last = (end - 1 - f->host) / f->unit_size;

    if (f->exist) {
        bitmap_set(f->exist, first, last - first + 1);
    }
    if (huge && f->huge) {
        /* Only whole ones; the first may begin before the memory does */
        first = DIV_ROUND_UP(start - f->huge_host, f->huge_size);
        last = (end - f->huge_host) / f->huge_size;
        if (first < last) {
            bitmap_set(f->huge, first, last - first);
        }
    }
}

/* Linux 6.7 */
static bool find_by_scan(HostPages *pages, Found *f, uint8_t *start,
                         uint8_t *end, Error **errp)
{
    struct page_region_v1 regions[256];

    while (start < end) {
        struct pm_scan_arg_v1 arg = {
            .vec = (uintptr_t)regions,
            .vec_len = ARRAY_SIZE(regions),
        };
        int i, n = pagemap_scan(pages, &arg, start, end);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            error_setg_errno(errp, errno, "Cannot scan /proc/self/pagemap");
            return false;
        }
        for (i = 0; i < n; i++) {
            found(f, (uint8_t *)(uintptr_t)regions[i].start,
                  (uint8_t *)(uintptr_t)regions[i].end,
                  /* That of zeroes takes no memory, and shall not */
                  regions[i].categories == PAGE_IS_HUGE_V1);
        }
        start = (uint8_t *)(uintptr_t)arg.walk_end;
    }
    return true;
}

void host_pages_prepare(HostPages *pages)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    Mapping now = {};
    char **line;

    if (pages->can_scan ||
        !g_file_get_contents("/proc/self/smaps", &text, NULL, NULL)) {
        return;
    }
    lines = g_strsplit(text, "\n", -1);
    for (line = lines; *line; line++) {
        Mapping next;
        uint64_t kib;

        if (sscanf(*line, "%" SCNx64 "-%" SCNx64 " ", &next.start,
                   &next.end) == 2) {
            now = next;
        } else if ((sscanf(*line, "AnonHugePages: %" SCNu64, &kib) == 1 ||
                    sscanf(*line, "ShmemPmdMapped: %" SCNu64, &kib) == 1) &&
                   kib) {
            g_array_append_val(pages->with_huge, now);
        }
    }
}

static bool mapping_has_huge_pages(HostPages *pages, const uint8_t *host)
{
    size_t i;

    for (i = 0; i < pages->with_huge->len; i++) {
        Mapping *m = &g_array_index(pages->with_huge, Mapping, i);

        if ((uintptr_t)host >= m->start && (uintptr_t)host < m->end) {
            return true;
        }
    }
    return false;
}

bool host_pages_know_huge(const HostPages *pages)
{
    return pages->can_scan;
}

/*
 * Before Linux 6.7.  Of hugetlbfs, pagemap does not tell pages that the host
 * moves at the moment from those that do not exist, but mincore() does.
 */
static bool find_by_reading(HostPages *pages, Found *f, uint8_t *start,
                            uint8_t *end, bool hugetlb, Error **errp)
{
    bool any_huge = f->huge && mapping_has_huge_pages(pages, f->host);
    size_t whole = f->huge_size / pages->page_size;
    size_t run = 0;
    uint64_t entries[512];
    unsigned char in_core[ARRAY_SIZE(entries)];

    while (start < end) {
        size_t n = MIN((end - start) / pages->page_size, ARRAY_SIZE(entries));
        off_t place = (uintptr_t)start / pages->page_size * sizeof(entries[0]);
        ssize_t size = n * sizeof(entries[0]);
        size_t i;

        if (hugetlb ? mincore(start, n * pages->page_size, in_core) < 0
                    : RETRY_ON_EINTR(pread(pages->fd, entries, size,
                                           place)) != size) {
            error_setg_errno(errp, errno, "Cannot tell which pages of memory "
                             "exist");
            return false;
        }
        for (i = 0; i < n; i++, start += pages->page_size) {
            if (hugetlb ? !(in_core[i] & 1)
                        : !(entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED))) {
                run = 0;
                continue;
            }
            found(f, start, start + pages->page_size, false);
            run++;
            if (any_huge && run >= whole && QEMU_PTR_IS_ALIGNED(
                    start + pages->page_size, f->huge_size)) {
                found(f, start + pages->page_size - f->huge_size,
                      start + pages->page_size, true);
            }
        }
    }
    return true;
}

bool host_pages_find_part(HostPages *pages, void *host, size_t offset,
                          size_t size, size_t unit_size, bool hugetlb,
                          unsigned long *exist, unsigned long *huge,
                          Error **errp)
{
    Found f = {
        .host = host,
        .unit_size = unit_size,
        .exist = exist,
        .huge = pages->huge_size && !hugetlb ? huge : NULL,
        .huge_size = pages->huge_size,
        .huge_host = pages->huge_size ?
            QEMU_ALIGN_PTR_DOWN((uint8_t *)host, pages->huge_size) : host,
    };
    uint8_t *start = (uint8_t *)host + offset;
    uint8_t *end = start + size;
    /*
     * Both ways look at hugetlbfs without its lock, and a page that the host
     * moves is nowhere for a moment: look twice.
     */
    int looks = hugetlb ? 2 : 1;

    while (looks--) {
        if (!(pages->can_scan ? find_by_scan(pages, &f, start, end, errp)
                              : find_by_reading(pages, &f, start, end, hugetlb,
                                                errp))) {
            return false;
        }
    }
    return true;
}

bool host_pages_present(const HostPages *pages, const void *host)
{
    uintptr_t page = (uintptr_t)host / pages->page_size;
    uint64_t entry;

    return RETRY_ON_EINTR(pread(pages->fd, &entry, sizeof(entry),
                                page * sizeof(entry))) != sizeof(entry) ||
           (entry & PAGEMAP_PRESENT);
}

bool host_pages_can_collapse(void)
{
    /* Of nothing, to ask whether the kernel can */
    return madvise(NULL, 0, MADV_COLLAPSE) == 0;
}

int host_pages_collapse(void *host, size_t huge_size)
{
    int tries = COLLAPSE_TRIES;

    while (madvise(host, huge_size, MADV_COLLAPSE) < 0) {
        if (errno != EAGAIN || !--tries) {
            return -errno;
        }
        g_usleep(1000);
    }
    return 0;
}

#else

HostPages *host_pages_new(bool scan, Error **errp)
{
    error_setg(errp, "This host does not tell which pages of memory exist");
    return NULL;
}

void host_pages_free(HostPages *pages)
{
    g_assert_not_reached();
}

void host_pages_prepare(HostPages *pages)
{
    g_assert_not_reached();
}

bool host_pages_know_huge(const HostPages *pages)
{
    return false;
}

size_t host_pages_huge_size(void)
{
    return 0;
}

bool host_pages_find_part(HostPages *pages, void *host, size_t offset,
                          size_t size, size_t unit_size, bool hugetlb,
                          unsigned long *exist, unsigned long *huge,
                          Error **errp)
{
    g_assert_not_reached();
}

bool host_pages_present(const HostPages *pages, const void *host)
{
    g_assert_not_reached();
}

bool host_pages_can_collapse(void)
{
    return false;
}

int host_pages_collapse(void *host, size_t huge_size)
{
    return -EINVAL;
}
#endif

bool host_pages_find(HostPages *pages, void *host, size_t size,
                     size_t unit_size, bool hugetlb, unsigned long *exist,
                     unsigned long *huge, Error **errp)
{
    return host_pages_find_part(pages, host, 0, size, unit_size, hugetlb,
                                exist, huge, errp);
}

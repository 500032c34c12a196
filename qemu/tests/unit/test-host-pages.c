/*
 * Unit tests for what the host's page tables say of memory
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "../migration/host-pages.h"
#include "memory-kinds.h"

typedef struct Test {
    const MemoryKind *kind;
    bool scan;                  /* see host_pages_new() */
    void (*fn)(HostPages *pages, Memory *m);
} Test;

static void check_exist(HostPages *pages, const Memory *m,
                        const unsigned long *expected)
{
    g_autofree unsigned long *exist = bitmap_new(m->num_pages);
    size_t page;

    host_pages_find(pages, m->host, m->size, m->page_size,
                    m->kind->backing == MEMORY_HUGETLB, exist, NULL,
                    &error_abort);
    for (page = 0; page < m->num_pages; page++) {
        g_assert_cmpint(!!test_bit(page, exist), ==,
                        !!test_bit(page, expected));
    }
}

/* Of two pages that are a unit, as if the guest's were larger, one exists */
static void test_units(HostPages *pages, Memory *m)
{
    g_autofree unsigned long *exist = bitmap_new(m->num_pages / 2);
    size_t unit;

    for (unit = 0; unit < m->num_pages / 2; unit += 3) {
        m->host[(2 * unit + unit % 2) * m->page_size] = 1;
    }
    host_pages_find(pages, m->host, m->size, 2 * m->page_size, false, exist,
                    NULL, &error_abort);
    for (unit = 0; unit < m->num_pages / 2; unit++) {
        g_assert_cmpint(!!test_bit(unit, exist), ==, unit % 3 == 0);
    }
}

/* Of memory that nobody has touched, some pages come into being */
static void test_untouched(HostPages *pages, Memory *m)
{
    g_autofree unsigned long *expected = bitmap_new(m->num_pages);
    size_t page;

    check_exist(pages, m, expected);
    for (page = 1; page < m->num_pages; page *= 3) {
        m->host[page * m->page_size + 17] = 1;
        bitmap_set(expected, page, 1);
    }
    check_exist(pages, m, expected);
    if (m->kind->backing == MEMORY_ANONYMOUS) {
        madvise(m->host, m->size, MADV_DONTNEED);
        test_units(pages, m);
    }
}

static void test_written(HostPages *pages, Memory *m)
{
    g_autofree unsigned long *expected = bitmap_new(m->num_pages);

    bitmap_set(expected, 0, m->num_pages);
    check_exist(pages, m, expected);
}

/* Returns how many ranges are said to be huge, and all must exist */
static size_t count_huge(HostPages *pages, const Memory *m, size_t first_page)
{
    size_t huge_size = host_pages_huge_size();
    uint8_t *host = m->host + first_page * m->page_size;
    size_t size = m->size - first_page * m->page_size;
    unsigned long huge = 0;
    g_autofree unsigned long *exist = bitmap_new(m->num_pages);

    host_pages_find(pages, host, size, m->page_size, false, exist, &huge,
                    &error_abort);
    g_assert_cmpuint(bitmap_count_one(exist, m->num_pages), ==,
                     size / m->page_size);
    /* One that begins before the memory that was asked about is none */
    g_assert_false(first_page && (huge & 1));
    g_assert_cmpuint(huge >> (m->size / huge_size), ==, 0);
    return ctpopl(huge);
}

/* Huge pages are split, which the kernel tells, and made huge again */
static void test_huge(HostPages *pages, Memory *m)
{
    size_t huge_size = host_pages_huge_size();
    size_t num_huge = m->size / huge_size;

    if (!host_pages_can_collapse()) {
        g_test_skip("The host cannot collapse memory into huge pages");
        return;
    }
    g_assert_cmpuint(num_huge, >=, 2);
    g_assert_cmpuint(count_huge(pages, m, 0), ==, num_huge);
    g_assert_cmpuint(count_huge(pages, m, 1), ==, num_huge - 1);

    mprotect(m->host, m->page_size, PROT_READ);
    mprotect(m->host, m->page_size, PROT_READ | PROT_WRITE);
    if (host_pages_know_huge(pages)) {
        g_assert_cmpuint(count_huge(pages, m, 0), ==, num_huge - 1);
    }
    g_assert_cmpint(host_pages_collapse(m->host, huge_size), ==, 0);
    g_assert_cmpuint(count_huge(pages, m, 0), ==, num_huge);
    memory_check_page(m, 1, m->host + m->page_size);
}

static void run(const void *opaque)
{
    const Test *test = opaque;
    HostPages *pages;
    Error *err = NULL;
    Memory m;

    if (!memory_map_or_skip(&m, test->kind)) {
        return;
    }
    pages = host_pages_new(test->scan, &err);
    if (pages) {
        host_pages_prepare(pages);
        test->fn(pages, &m);
        host_pages_free(pages);
    } else {
        g_test_skip(error_get_pretty(err));
        error_free(err);
    }
    memory_unmap(&m);
}

static void add_test(const MemoryKind *kind, bool scan)
{
    g_autofree char *path = g_strdup_printf("/host-pages/%s/%s",
                                            scan ? "scan" : "read",
                                            kind->name);
    Test *test = g_new0(Test, 1);

    test->kind = kind;
    test->scan = scan;
    switch (kind->state) {
    case MEMORY_UNTOUCHED:
        test->fn = test_untouched;
        break;
    case MEMORY_HUGE:
        test->fn = test_huge;
        break;
    default:
        test->fn = test_written;
        break;
    }
    g_test_add_data_func_full(path, test, (GTestDataFunc)run, g_free);
}

int main(int argc, char **argv)
{
    const MemoryKind *kind;

    g_test_init(&argc, &argv, NULL);
    for (kind = memory_kinds; kind->name; kind++) {
        /*
         * Of shared memory, and of a file that nobody has written to, there
         * may be more than is in the page tables
         */
        if (!kind->shared && (kind->backing == MEMORY_ANONYMOUS ||
                              kind->state == MEMORY_UNTOUCHED)) {
            add_test(kind, true);
            add_test(kind, false);
        }
    }
    return g_test_run();
}

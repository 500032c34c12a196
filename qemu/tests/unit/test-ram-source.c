/*
 * Unit tests for reading RAM without having the host allocate any
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "../migration/ram-source.h"
#include "memory-kinds.h"
#include "real-write-traps.h"

/* What is read at a time, as pages of the image are */
#define PAGE_SIZE 4096

static RAMSource source_of(const Memory *m, HostPages *pages)
{
    RAMSource source = {
        .host = m->host,
        .size = m->size,
        .unit_size = m->page_size,
        .shared = m->kind->shared,
        .fd = m->fd,
        .fd_offset = m->fd_offset,
    };

    ram_source_init(&source, pages);
    ram_source_look(&source, NULL, &error_abort);
    return source;
}

/* Read a page of the host, by parts.  Returns where from. */
static RAMSourceKind read_page(const RAMSource *source, const Memory *m,
                               size_t page, uint8_t *buf)
{
    RAMSourceKind from = ram_source_find(source, page);
    size_t offset = page * m->page_size, i;

    memset(buf, from == RAM_SOURCE_ZERO ? 0 : 0xdd, m->page_size);
    for (i = 0; i < m->page_size; i += PAGE_SIZE) {
        if (from == RAM_SOURCE_FILE) {
            ram_source_read(source, offset + i, buf + i, PAGE_SIZE);
        } else if (from == RAM_SOURCE_MEMORY) {
            memcpy(buf + i, m->host + offset + i, PAGE_SIZE);
        }
    }
    return from;
}

/* Assert that all is read as expected and costs nothing */
static void check_all(const Memory *m, const RAMSource *source)
{
    g_autofree uint8_t *buf = g_malloc(m->page_size);
    size_t before = memory_allocated(m), page;

    for (page = 0; page < m->num_pages; page++) {
        RAMSourceKind from = read_page(source, m, page, buf);

        memory_check_page(m, page, buf);
        if (m->kind->state == MEMORY_UNTOUCHED) {
            g_assert_cmpint(from, ==, m->fd >= 0 ? RAM_SOURCE_FILE :
                                                   RAM_SOURCE_ZERO);
        } else if (m->fd < 0) {
            g_assert_cmpint(from, ==, RAM_SOURCE_MEMORY);
        }
    }
    g_assert_cmpuint(memory_allocated(m), <=, before);
}

static void test_read(const void *kind)
{
    Memory m;

    if (memory_map_or_skip(&m, kind)) {
        HostPages *pages = host_pages_new(true, &error_abort);
        RAMSource source = source_of(&m, pages);

        check_all(&m, &source);
        ram_source_cleanup(&source);
        host_pages_free(pages);
        memory_unmap(&m);
    }
}

static bool no_fault(void *host, void *opaque)
{
    return false;
}

/* Nor does it cost anything with the traps of a snapshot */
static void test_read_armed(const void *kind)
{
    const WriteTrapOps *const *ops;
    HostPages *pages;
    RAMSource source;
    Memory m;

    for (ops = real_traps(); *ops; ops++) {
        Error *err = NULL;
        WriteTrap *trap;

        if (!real_trap_available(*ops, &err)) {
            g_test_message("not with %s: %s", (*ops)->name,
                           error_get_pretty(err));
            error_free(err);
            continue;
        }
        if (!real_trap_serves(*ops, kind)) {
            continue;
        }
        g_test_message("with %s", (*ops)->name);
        if (!memory_map_or_skip(&m, kind)) {
            return;
        }
        trap = (*ops)->new(m.host, m.size, no_fault, NULL, &error_abort);
        (*ops)->add(trap, m.host, m.size, &error_abort);
        pages = host_pages_new(true, &error_abort);
        source = source_of(&m, pages);
        (*ops)->arm(trap, m.host, m.size, &error_abort);
        check_all(&m, &source);
        (*ops)->release(trap, m.host, m.size);
        (*ops)->free(trap);
        ram_source_cleanup(&source);
        host_pages_free(pages);
        memory_unmap(&m);
    }
}

/*
 * Pages of a file that nobody has touched, that were written through the
 * mapping, through another mapping, and through the other and then the one
 */
static void test_written(const void *kind)
{
    enum { NOWHERE, HERE, THERE, THERE_AND_HERE };
    g_autofree uint8_t *buf = NULL;
    size_t before, page;
    HostPages *pages;
    RAMSource source;
    uint8_t *other;
    Memory m;

    if (!memory_map_or_skip(&m, kind)) {
        return;
    }
    buf = g_malloc(m.page_size);
    other = mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd,
                 m.fd_offset);
    g_assert(other != MAP_FAILED);
    for (page = 0; page < m.num_pages; page++) {
        if (page % 4 == THERE || page % 4 == THERE_AND_HERE) {
            memset(other + page * m.page_size, 100 + page, m.page_size);
        }
        if (page % 4 == HERE || page % 4 == THERE_AND_HERE) {
            memset(m.host + page * m.page_size, page, m.page_size);
        }
    }

    before = memory_allocated(&m);
    pages = host_pages_new(true, &error_abort);
    source = source_of(&m, pages);
    for (page = 0; page < m.num_pages; page++) {
        static const RAMSourceKind from[] = {
            RAM_SOURCE_FILE, RAM_SOURCE_MEMORY,
            RAM_SOURCE_FILE, RAM_SOURCE_MEMORY
        };
        const uint8_t expected[] = { 0, page, 100 + page, page };

        g_assert_cmpint(read_page(&source, &m, page, buf), ==,
                        from[page % 4]);
        g_assert_cmpint(buf[0], ==, expected[page % 4]);
        g_assert_cmpint(memcmp(buf, buf + 1, m.page_size - 1), ==, 0);
    }
    g_assert_cmpuint(memory_allocated(&m), ==, before);
    ram_source_cleanup(&source);
    host_pages_free(pages);
    munmap(other, m.size);
    memory_unmap(&m);
}

/* A file that cannot be read, or ends too early: the mapping has it */
static void test_bad_file(void)
{
    static const MemoryKind kind = {
        "memfd", MEMORY_MEMFD, true, MEMORY_WRITTEN
    };
    struct {
        int fd;
        uint64_t fd_offset;
        RAMSourceKind from;
    } files[] = {
        { -1, 0, RAM_SOURCE_MEMORY },
        { open("/dev/null", O_WRONLY), 0, RAM_SOURCE_FILE },
        { open("/dev/null", O_RDONLY), 0, RAM_SOURCE_FILE },
        { memfd_create("short", 0), 0, RAM_SOURCE_FILE },
        { memfd_create("short", 0), INT64_MAX - PAGE_SIZE, RAM_SOURCE_FILE },
    };
    HostPages *pages = host_pages_new(true, &error_abort);
    uint8_t buf[PAGE_SIZE];
    Memory m;
    size_t i;

    g_assert_true(memory_map(&m, &kind, &error_abort));
    g_assert_cmpint(ftruncate(files[3].fd, PAGE_SIZE / 2), ==, 0);
    for (i = 0; i < ARRAY_SIZE(files); i++) {
        RAMSource source = source_of(&m, pages);

        /* So that it is to be read from the file */
        g_assert_cmpint(madvise(m.host, m.size, MADV_DONTNEED), ==, 0);
        ram_source_cleanup(&source);
        source.fd = files[i].fd;
        source.fd_offset = files[i].fd_offset;
        ram_source_init(&source, pages);
        g_assert_cmpint(ram_source_find(&source, 0), ==, files[i].from);
        memset(buf, 0xdd, sizeof(buf));
        ram_source_read(&source, 0, buf, sizeof(buf));
        g_assert_cmpmem(buf, PAGE_SIZE, m.host, PAGE_SIZE);
        g_assert_cmpint(buf[0], ==, memory_expected(&m, 0));
        ram_source_cleanup(&source);
        if (files[i].fd >= 0) {
            close(files[i].fd);
        }
    }
    host_pages_free(pages);
    memory_unmap(&m);
}

static void add_test(const char *name, const MemoryKind *kind,
                     GTestDataFunc fn)
{
    g_autofree char *path = g_strdup_printf("/ram-source/%s/%s", name,
                                            kind->name);

    g_test_add_data_func(path, kind, fn);
}

int main(int argc, char **argv)
{
    const MemoryKind *kind;

    g_test_init(&argc, &argv, NULL);
    for (kind = memory_kinds; kind->name; kind++) {
        if (!memory_available(kind)) {
            add_test("all", kind, memory_skip);
            continue;
        }
        add_test("read", kind, test_read);
        add_test("read-armed", kind, test_read_armed);
        if (kind->state == MEMORY_UNTOUCHED &&
            kind->backing != MEMORY_ANONYMOUS) {
            add_test("written", kind, test_written);
        }
    }
    g_test_add_func("/ram-source/bad-file", test_bad_file);
    return g_test_run();
}

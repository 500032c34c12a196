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

static RAMSource source_of(const Memory *m)
{
    RAMSource source = {
        .host = m->host,
        .shared = m->kind->shared,
        .fd = m->fd,
        .fd_offset = m->fd_offset,
    };

    ram_source_init(&source);
    return source;
}

/* Read a page of the host, by parts.  Returns whether from the file. */
static bool read_page(const RAMSource *source, const Memory *m, size_t page,
                      uint8_t *buf)
{
    size_t offset = page * m->page_size, i;
    bool in_file = ram_source_in_file(source, offset);

    memset(buf, 0xdd, m->page_size);
    for (i = 0; i < m->page_size; i += PAGE_SIZE) {
        if (in_file) {
            ram_source_read(source, offset + i, buf + i, PAGE_SIZE);
        } else {
            memcpy(buf + i, m->host + offset + i, PAGE_SIZE);
        }
    }
    return in_file;
}

/* Assert that all is read as expected and costs nothing */
static void check_all(const Memory *m)
{
    g_autofree uint8_t *buf = g_malloc(m->page_size);
    size_t before = memory_allocated(m), page;
    RAMSource source = source_of(m);

    for (page = 0; page < m->num_pages; page++) {
        bool in_file = read_page(&source, m, page, buf);

        memory_check_page(m, page, buf);
        g_assert_false(in_file && m->fd < 0);
        if (m->fd >= 0 && m->kind->state == MEMORY_UNTOUCHED) {
            g_assert_true(in_file);
        }
    }
    g_assert_cmpuint(memory_allocated(m), <=, before);
    ram_source_cleanup(&source);
}

static void test_read(const void *kind)
{
    Memory m;

    if (memory_map_or_skip(&m, kind)) {
        check_all(&m);
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
    Memory m;

    for (ops = real_traps; *ops; ops++) {
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
        (*ops)->arm(trap, m.host, m.size, &error_abort);
        check_all(&m);
        (*ops)->release(trap, m.host, m.size);
        (*ops)->free(trap);
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
    source = source_of(&m);
    for (page = 0; page < m.num_pages; page++) {
        static const bool in_file[] = { true, false, true, false };
        const uint8_t expected[] = { 0, page, 100 + page, page };

        g_assert_cmpint(read_page(&source, &m, page, buf), ==,
                        in_file[page % 4]);
        g_assert_cmpint(buf[0], ==, expected[page % 4]);
        g_assert_cmpint(memcmp(buf, buf + 1, m.page_size - 1), ==, 0);
    }
    g_assert_cmpuint(memory_allocated(&m), ==, before);
    ram_source_cleanup(&source);
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
        bool in_file;
    } files[] = {
        { -1, 0, false },
        { open("/dev/null", O_WRONLY), 0, true },
        { open("/dev/null", O_RDONLY), 0, true },
        { memfd_create("short", 0), 0, true },
        { memfd_create("short", 0), INT64_MAX - PAGE_SIZE, true },
    };
    uint8_t buf[PAGE_SIZE];
    Memory m;
    size_t i;

    g_assert_true(memory_map(&m, &kind, &error_abort));
    g_assert_cmpint(ftruncate(files[3].fd, PAGE_SIZE / 2), ==, 0);
    for (i = 0; i < ARRAY_SIZE(files); i++) {
        RAMSource source = source_of(&m);

        /* So that it is to be read from the file */
        g_assert_cmpint(madvise(m.host, m.size, MADV_DONTNEED), ==, 0);
        ram_source_cleanup(&source);
        source.fd = files[i].fd;
        source.fd_offset = files[i].fd_offset;
        ram_source_init(&source);
        g_assert_cmpint(ram_source_in_file(&source, 0), ==, files[i].in_file);
        memset(buf, 0xdd, sizeof(buf));
        ram_source_read(&source, 0, buf, sizeof(buf));
        g_assert_cmpmem(buf, PAGE_SIZE, m.host, PAGE_SIZE);
        g_assert_cmpint(buf[0], ==, memory_expected(&m, 0));
        ram_source_cleanup(&source);
        if (files[i].fd >= 0) {
            close(files[i].fd);
        }
    }
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

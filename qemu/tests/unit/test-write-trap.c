/*
 * Unit tests for write traps: cases × kinds of memory × traps
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/resource.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/memfd.h"
#include "qemu/thread.h"
#include "memory-kinds.h"
#include "real-write-traps.h"

/* Some memory with an armed trap, and what it has stopped */
typedef struct Trapped {
    Memory m;
    const WriteTrapOps *ops;
    WriteTrap *trap;
    /* Before there was a trap; bytes */
    size_t allocated;
    /* Writes that were stopped, by page */
    int *stopped;
    /* No stopped write goes on */
    bool hold;

    /* The last one: its address, who was told, and what was there then */
    uint8_t *host;
    pthread_t thread;
    uint8_t seen;
} Trapped;

/* Where the tests write */
static uint8_t *page_byte(Trapped *t, size_t page)
{
    return t->m.host + page * t->m.page_size + page * 37 % t->m.page_size;
}

static void release(Trapped *t, size_t page, size_t num_pages)
{
    g_assert_cmpint(t->ops->release(t->trap,
                                    t->m.host + page * t->m.page_size,
                                    num_pages * t->m.page_size), ==, 0);
}

static bool fault_fn(void *host, void *opaque)
{
    Trapped *t = opaque;
    size_t page = ((uint8_t *)host - t->m.host) / t->m.page_size;

    g_assert_nonnull(t->trap);
    g_assert_cmpuint(page, <, t->m.num_pages);
    t->host = host;
    t->thread = pthread_self();
    t->seen = qatomic_read(page_byte(t, page));
    qatomic_inc(&t->stopped[page]);
    while (qatomic_read(&t->hold)) {
        g_usleep(100);
    }
    release(t, page, 1);
    return true;
}

/* In two ranges, side by side */
static bool arm(Trapped *t, Error **errp)
{
    size_t size = t->m.size / 2;
    int i;

    t->trap = t->ops->new(t->m.host, t->m.size, fault_fn, t, &error_abort);
    g_assert_true(t->trap->ops == t->ops);
    for (i = 0; i < 2; i++) {
        if (!t->ops->add(t->trap, t->m.host + i * size, size, errp)) {
            return false;
        }
        if (!t->m.kind->shared && t->ops->prepare) {
            t->ops->prepare(t->trap, t->m.host + i * size);
        }
    }
    for (i = 0; i < 2; i++) {
        t->ops->arm(t->trap, t->m.host + i * size, size, &error_abort);
    }
    return true;
}

static void disarm(Trapped *t)
{
    release(t, 0, t->m.num_pages);
    t->ops->free(t->trap);
    t->trap = NULL;
}

/* Assert that a write goes through, and whether it is stopped on its way */
static void write_page(Trapped *t, size_t page, bool stopped)
{
    uint8_t *host = page_byte(t, page);
    uint8_t was = *host;
    int before = t->stopped[page];

    qatomic_set(host, 0xfe);
    g_assert_cmpint(*host, ==, 0xfe);
    g_assert_cmpint(t->stopped[page], ==, before + stopped);
    if (stopped) {
        /* Messages tell the page alone */
        g_assert_true(t->host == host || !t->ops->in_thread);
        g_assert_cmpint(!!pthread_equal(t->thread, pthread_self()), ==,
                        t->ops->in_thread);
        g_assert_cmpuint((t->host - t->m.host) / t->m.page_size, ==, page);
        g_assert_cmpint(t->seen, ==, was);
    }

    *host = was;
    memory_check_page(&t->m, page, t->m.host + page * t->m.page_size);
}

static void write_all(Trapped *t, bool stopped)
{
    size_t i;

    /* In no order; 5 divides no number of pages */
    for (i = 0; i < t->m.num_pages; i++) {
        size_t page = i * 5 % t->m.num_pages;

        write_page(t, page, stopped);
        write_page(t, page, false);
    }
}

static int num_stopped(Trapped *t)
{
    size_t i;
    int sum = 0;

    for (i = 0; i < t->m.num_pages; i++) {
        sum += t->stopped[i];
    }
    return sum;
}

static void test_write(Trapped *t)
{
    write_all(t, true);
}

static void test_read(Trapped *t)
{
    size_t i;

    for (i = 0; i < t->m.num_pages; i++) {
        memory_check_page(&t->m, i, t->m.host + i * t->m.page_size);
    }
    g_assert_cmpint(num_stopped(t), ==, 0);
    write_all(t, true);
}

typedef struct Reader {
    QemuThread thread;
    int fd;
    uint8_t *host;
    bool done;
} Reader;

static void *reader_thread(void *opaque)
{
    Reader *r = opaque;

    g_assert_cmpint(read(r->fd, r->host, 1), ==, 1);
    qatomic_set(&r->done, true);
    return NULL;
}

static void test_system_call(Trapped *t)
{
    size_t pages[] = { 0, t->m.num_pages - 1 };
    int fds[2], i;

    g_assert_cmpint(pipe(fds), ==, 0);
    for (i = 0; i < ARRAY_SIZE(pages); i++) {
        uint8_t was = memory_expected(&t->m, pages[i]);
        Reader r = { .fd = fds[0], .host = page_byte(t, pages[i]) };

        g_assert_cmpint(write(fds[1], "\xfe", 1), ==, 1);
        if (t->ops->in_thread) {
            g_assert_cmpint(read(fds[0], r.host, 1), ==, -1);
            g_assert_cmpint(errno, ==, EFAULT);
            g_assert_cmpint(num_stopped(t), ==, 0);
            g_assert_cmpint(*r.host, ==, was);

            release(t, pages[i], 1);
            g_assert_cmpint(read(fds[0], r.host, 1), ==, 1);
            g_assert_cmpint(num_stopped(t), ==, 0);
        } else {
            qatomic_set(&t->hold, true);
            qemu_thread_create(&r.thread, "reader", reader_thread, &r,
                               QEMU_THREAD_JOINABLE);
            while (!qatomic_read(&t->stopped[pages[i]])) {
                g_usleep(100);
            }
            g_usleep(5000);
            g_assert_false(qatomic_read(&r.done));
            g_assert_cmpint(*r.host, ==, was);

            qatomic_set(&t->hold, false);
            qemu_thread_join(&r.thread);
            g_assert_cmpint(num_stopped(t), ==, i + 1);
        }
        g_assert_cmpint(*r.host, ==, 0xfe);
        *r.host = was;
        write_page(t, pages[i], false);
    }
    close(fds[0]);
    close(fds[1]);
}

/* Across the border of the two ranges that were armed */
static void test_release_part(Trapped *t)
{
    size_t first = t->m.num_pages / 4, end = t->m.num_pages / 2 + 1, i;

    release(t, first, end - first);
    for (i = 0; i < t->m.num_pages; i++) {
        write_page(t, i, i < first || i >= end);
    }
}

/* Returns: the signal that a denied write to a page ends a child with, or 0 */
static int killed_by_write(uint8_t *host, int signal)
{
    const struct rlimit no_core = { 0, 0 };
    size_t size = qemu_real_host_page_size();
    pid_t pid = fork();
    int status;

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        setrlimit(RLIMIT_CORE, &no_core);
        /* Should the fault be repeated for ever */
        alarm(30);
        if (signal == SIGBUS) {
            /* Beyond the end of a file */
            mmap(host, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                 qemu_memfd_create("empty", 0, false, 0, 0, &error_abort), 0);
        } else {
            mprotect(host, size, PROT_READ);
        }
        qatomic_set(host, 1);
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void test_again(Trapped *t)
{
    write_page(t, 0, true);
    write_page(t, t->m.num_pages / 2, true);
    disarm(t);
    /* Nobody is stopped any more, nor asked about other faults */
    memset(t->stopped, 0, t->m.num_pages * sizeof(*t->stopped));
    write_all(t, false);
    if (t->ops->in_thread && t->m.page_size == qemu_real_host_page_size()) {
        int signal = t->ops->raises_sigbus ? SIGBUS : SIGSEGV;

        g_assert_cmpint(killed_by_write(t->m.host, signal), ==, signal);
    }

    /* There can be another one */
    arm(t, &error_abort);
    write_all(t, true);
}

/* Memory that the host has lost is mapped anew, and nothing stops writes */
static void test_mapped_anew(Trapped *t)
{
    size_t page = t->m.num_pages / 2 - 1;
    uint8_t *host = t->m.host + page * t->m.page_size;

    int flags = t->m.kind->shared ? MAP_SHARED : MAP_PRIVATE;

    flags |= MAP_FIXED | (t->m.fd < 0 ? MAP_ANONYMOUS : 0);
    g_assert_true(mmap(host, t->m.page_size, PROT_READ | PROT_WRITE, flags,
                       t->m.fd, t->m.fd_offset + page * t->m.page_size) ==
                  host);
    memset(host, memory_expected(&t->m, page), t->m.page_size);
    write_page(t, page, false);
    write_page(t, page - 1, true);
    /* All the others are released with it */
    disarm(t);
    write_all(t, false);
    arm(t, &error_abort);
}

#define NUM_WRITERS 4

typedef struct Writer {
    QemuThread thread;
    Trapped *t;
    size_t number;
    int *begun;
} Writer;

static uint8_t *writer_byte(Writer *w, size_t page)
{
    return w->t->m.host + page * w->t->m.page_size + 64 * w->number + 1;
}

/* Each begins elsewhere, and does not help another with its first write */
static void *writer_thread(void *opaque)
{
    Writer *w = opaque;
    size_t n = w->t->m.num_pages, i;

    for (i = 0; i < n; i++) {
        qatomic_set(writer_byte(w, (i + w->number * n / NUM_WRITERS) % n),
                    0xfe);
        if (i == 0) {
            qatomic_inc(w->begun);
        }
        while (qatomic_read(w->begun) < NUM_WRITERS) {
            g_usleep(100);
        }
    }
    return NULL;
}

static void test_threads(Trapped *t)
{
    Writer writers[NUM_WRITERS];
    size_t i, j;
    int begun = 0;

    /* Until all are stopped, or tell of it */
    qatomic_set(&t->hold, true);
    for (i = 0; i < NUM_WRITERS; i++) {
        writers[i].t = t;
        writers[i].number = i;
        writers[i].begun = &begun;
        qemu_thread_create(&writers[i].thread, "writer", writer_thread,
                           &writers[i], QEMU_THREAD_JOINABLE);
    }
    g_usleep(5000);
    qatomic_set(&t->hold, false);
    for (i = 0; i < NUM_WRITERS; i++) {
        qemu_thread_join(&writers[i].thread);
    }
    for (i = 0; i < t->m.num_pages; i++) {
        g_assert_cmpint(t->stopped[i], >=, 1);
        g_assert_cmpint(t->stopped[i], <=, NUM_WRITERS);
        for (j = 0; j < NUM_WRITERS; j++) {
            uint8_t *host = writer_byte(&writers[j], i);

            g_assert_cmpint(*host, ==, 0xfe);
            *host = memory_expected(&t->m, i);
        }
        memory_check_page(&t->m, i, t->m.host + i * t->m.page_size);
    }
}

/* Memory that does not exist is not armed, nor what is read there */
static void test_left_alone(Trapped *t)
{
    size_t half = t->m.num_pages / 2, i;

    for (i = 0; i < half; i++) {
        memory_check_page(&t->m, i, t->m.host + i * t->m.page_size);
    }
    write_all(t, false);
}

/* Memory that was not there still is not, and may be written */
static void test_allocates_nothing(Trapped *t)
{
    size_t before = t->allocated;

    if (!real_trap_is_uffd(t->ops) && !t->m.kind->shared) {
        /* It puts a page of each range in use, and of memfd the file's too */
        size_t pages = t->m.kind->backing == MEMORY_MEMFD ? 4 : 2;

        g_assert_cmpuint(pages, <, t->m.num_pages);
        before += pages * t->m.page_size;
    }
    g_assert_cmpuint(memory_allocated(&t->m), <=, before);
    disarm(t);
    g_assert_cmpuint(memory_allocated(&t->m), <=, before);
    arm(t, &error_abort);
    g_assert_cmpuint(memory_allocated(&t->m), <=, before);
}

static const struct {
    const char *name;
    void (*fn)(Trapped *t);
    bool untouched;             /* only for such memory */
} cases[] = {
    { "write", test_write },
    { "read", test_read },
    { "system-call", test_system_call },
    { "release-part", test_release_part },
    { "again", test_again },
    { "mapped-anew", test_mapped_anew },
    { "threads", test_threads },
    { "allocates-nothing", test_allocates_nothing, true },
};

typedef struct Test {
    const MemoryKind *kind;
    const WriteTrapOps *ops;
    void (*fn)(Trapped *t);     /* NULL: the trap is refused */
} Test;

static void run(const void *opaque)
{
    const Test *test = opaque;
    Trapped t = { .ops = test->ops };
    Error *err = NULL;

    if (!memory_map_or_skip(&t.m, test->kind)) {
        return;
    }
    t.stopped = g_new0(int, t.m.num_pages);
    t.allocated = memory_allocated(&t.m);
    if (test->fn) {
        arm(&t, &error_abort);
        test->fn(&t);
        disarm(&t);
    } else {
        g_assert_false(arm(&t, &err));
        error_free_or_abort(&err);
        t.ops->free(t.trap);
    }
    write_all(&t, false);
    g_free(t.stopped);
    memory_unmap(&t.m);
}

static void add_test(const MemoryKind *kind, const WriteTrapOps *ops,
                     const char *name, void (*fn)(Trapped *t))
{
    g_autofree char *path = g_strdup_printf("/write-trap/%s/%s/%s", ops->name,
                                            kind->name, name);
    Test *test = g_new(Test, 1);

    *test = (Test) { kind, ops, fn };
    g_test_add_data_func_full(path, test, (GTestDataFunc)run, g_free);
}

static void add_tests(const MemoryKind *kind, const WriteTrapOps *ops)
{
    bool untouched = kind->state == MEMORY_UNTOUCHED;
    size_t i;

    if (!real_trap_serves(ops, kind)) {
        add_test(kind, ops, "refused", NULL);
        return;
    }
    if (untouched && kind->backing == MEMORY_ANONYMOUS &&
        !ops->arms_untouched) {
        add_test(kind, ops, "left-alone", test_left_alone);
        add_test(kind, ops, "allocates-nothing", test_allocates_nothing);
        return;
    }
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        if (untouched || !cases[i].untouched) {
            add_test(kind, ops, cases[i].name, cases[i].fn);
        }
    }
}

int main(int argc, char **argv)
{
    const WriteTrapOps *const *trap;
    const MemoryKind *kind;

    g_test_init(&argc, &argv, NULL);
    for (trap = real_traps(); *trap; trap++) {
        if (!real_trap_available(*trap, NULL)) {
            g_autofree char *path = g_strdup_printf("/write-trap/%s",
                                                    (*trap)->name);

            g_test_add_data_func(path, *trap, real_trap_skip);
            continue;
        }
        for (kind = memory_kinds; kind->name; kind++) {
            if (memory_available(kind)) {
                add_tests(kind, *trap);
            }
        }
    }
    for (kind = memory_kinds; kind->name; kind++) {
        if (!memory_available(kind)) {
            g_autofree char *path = g_strdup_printf("/write-trap/all/%s",
                                                    kind->name);

            g_test_add_data_func(path, kind, memory_skip);
        }
    }
    return g_test_run();
}

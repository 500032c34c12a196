/*
 * The RAM of a background snapshot, driven without a guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Threads write to memory as vCPUs do, a snapshot of it is taken, and other
 * threads write that to some sink.  Each page must come out once and as it was,
 * so that figures are those of a correct run.  Prints a line of JSON.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/bitops.h"
#include "qemu/madvise.h"
#include "qemu/module.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#ifdef HAVE_MALLINFO2
#include <malloc.h>
#endif
#include "snapshot-ram-figures.h"

#define PAGE_SIZE 4096

/* As background snapshots have it */
#define BUSY_NS (100 * SCALE_US)
#define STALL_LIMIT_MS 10000

/* What tests take for a failure, and for a trap that the host does not allow */
#define EXIT_SKIPPED 77

static struct {
    int ram_mib;
    int touch_mib;
    int set_mib;
    gboolean thp;
    int vcpus;
    int rate;
    char *pattern;
    int warm_ms;
    int writers;
    char *sink;
    int sink_rate;
    int buffer_mib;
    char *trap;
    gboolean locks;
} opt = {
    .ram_mib = 1024,
    .touch_mib = -1,
    .set_mib = -1,
    .vcpus = 1,
    .warm_ms = 100,
    .writers = 1,
    .buffer_mib = 128,
};

static const GOptionEntry entries[] = {
    { "ram", 0, 0, G_OPTION_ARG_INT, &opt.ram_mib,
      "RAM to save (1024)", "MIB" },
    { "touch", 0, 0, G_OPTION_ARG_INT, &opt.touch_mib,
      "Of it, what exists (all)", "MIB" },
    { "set", 0, 0, G_OPTION_ARG_INT, &opt.set_mib,
      "Of that, what is written to (all)", "MIB" },
    { "thp", 0, 0, G_OPTION_ARG_NONE, &opt.thp,
      "Have it in huge pages, and mend what is split", NULL },
    { "vcpus", 0, 0, G_OPTION_ARG_INT, &opt.vcpus,
      "Threads that write to it (1)", "N" },
    { "rate", 0, 0, G_OPTION_ARG_INT, &opt.rate,
      "Writes of each in a second (as fast as can be)", "N" },
    { "pattern", 0, 0, G_OPTION_ARG_STRING, &opt.pattern,
      "Pages of each: random, ordered, or same, the same as all others "
      "(random)", "NAME" },
    { "warm", 0, 0, G_OPTION_ARG_INT, &opt.warm_ms,
      "How long they write before (100)", "MS" },
    { "writers", 0, 0, G_OPTION_ARG_INT, &opt.writers,
      "Threads that write the image (1)", "N" },
    { "sink", 0, 0, G_OPTION_ARG_STRING, &opt.sink,
      "Where to: none, memory, or a file's name (none)", "SINK" },
    { "sink-rate", 0, 0, G_OPTION_ARG_INT, &opt.sink_rate,
      "How fast it is (as fast as can be)", "MIB/S" },
    { "buffer", 0, 0, G_OPTION_ARG_INT, &opt.buffer_mib,
      "The page buffer's size (128)", "MIB" },
    { "trap", 0, 0, G_OPTION_ARG_STRING, &opt.trap,
      "mprotect, uffd-signal or uffd-thread (mprotect)", "NAME" },
    { "locks", 0, 0, G_OPTION_ARG_NONE, &opt.locks,
      "Count how often locks are taken, which costs time", NULL },
    { NULL }
};

typedef struct VCPU {
    QemuThread thread;
    uint64_t random;
    Histogram all;
    Histogram stopped;
} VCPU;

typedef struct ImageWriter {
    QemuThread thread;
    uint64_t pages;
    uint64_t data_pages;
    /* Of the pages' numbers; tells if one came twice in another's place */
    uint64_t sum;
} ImageWriter;

typedef enum Phase { BEFORE, FREEZE, AFTER, END } Phase;

static struct {
    SnapshotRAM *ram;
    uint8_t *host;
    size_t num_pages;
    size_t touched;
    Phase phase;
    unsigned int num_frozen;
    QemuEvent thaw;
    /* A bit for each page that was written to before the snapshot */
    unsigned long *written;
    /* And for each whose write was stopped, until the writer knows */
    unsigned long *stopped;
    const WriteTrapOps *trap;
    WriteTrapFaultFn *fault;
    int fd;
} bench = { .fd = -1 };

static bool bench_fault(void *host, void *opaque)
{
    set_bit_atomic(((uint8_t *)host - bench.host) / PAGE_SIZE, bench.stopped);
    return bench.fault(host, opaque);
}

/* The trap's new(), with a function that takes note of what is stopped */
static WriteTrap *bench_trap_new(void *start, size_t size,
                                 WriteTrapFaultFn *fault, void *opaque,
                                 Error **errp)
{
    bench.fault = fault;
    return bench.trap->new(start, size, bench_fault, opaque, errp);
}

static uint64_t content(size_t page, Phase phase)
{
    return (uint64_t)phase << 48 | (page + 1);
}

static void *page_word(size_t page)
{
    return bench.host + page * PAGE_SIZE;
}

static void sleep_until(int64_t ns)
{
    int64_t us = (ns - get_clock()) / SCALE_US;

    if (us > 0) {
        g_usleep(us);
    }
}

static size_t next_page(VCPU *v, size_t page, size_t num)
{
    if (!g_str_equal(opt.pattern, "random")) {
        return (page + 1) % num;
    }
    v->random ^= v->random << 13;
    v->random ^= v->random >> 7;
    v->random ^= v->random << 17;
    return v->random % num;
}

static void *vcpu_thread(void *opaque)
{
    VCPU *v = opaque;
    size_t num = opt.set_mib * (MiB / PAGE_SIZE);
    size_t page = g_str_equal(opt.pattern, "same") ? 0 : v->random % num;
    int64_t due = get_clock();
    Phase phase;

    while ((phase = qatomic_load_acquire(&bench.phase)) != END) {
        int64_t start;

        if (phase == FREEZE) {
            qatomic_inc(&bench.num_frozen);
            qemu_event_wait(&bench.thaw);
            continue;
        }
        if (opt.rate) {
            sleep_until(due);
            due = MAX(due + NANOSECONDS_PER_SECOND / opt.rate,
                      get_clock() - NANOSECONDS_PER_SECOND / 100);
        }
        page = next_page(v, page, num);
        if (phase == BEFORE && !test_bit(page, bench.written)) {
            set_bit_atomic(page, bench.written);
        }
        start = get_clock();
        qatomic_set((uint64_t *)page_word(page), content(page, phase + 1));
        if (phase == AFTER) {
            int64_t ns = get_clock() - start;

            histogram_add(&v->all, ns);
            if (test_bit(page, bench.stopped) &&
                bitmap_test_and_clear_atomic(bench.stopped, page, 1)) {
                histogram_add(&v->stopped, ns);
            }
        }
    }
    return NULL;
}

static void check_page(ImageWriter *w, const SnapshotPage *page)
{
    size_t first = page->offset / PAGE_SIZE, n = page->num_pages;

    if (page->data) {
        g_assert_cmphex(*(uint64_t *)page->data, ==,
                        content(first, test_bit(first, bench.written)));
        w->data_pages++;
    } else {
        g_assert_cmpuint(first, >=, bench.touched);
    }
    w->pages += n;
    w->sum += n * first + n * (n - 1) / 2;
}

/* Pages that follow one another in the image and in the buffer at once */
static void write_file(const SnapshotPage *pages, size_t n)
{
    size_t i, end;

    for (i = 0; i < n; i = end) {
        size_t size;

        for (end = i + 1; end < n && pages[i].data &&
             pages[end].data == pages[i].data + (end - i) * PAGE_SIZE &&
             pages[end].offset == pages[i].offset + (end - i) * PAGE_SIZE;
             end++) {
            ;
        }
        size = (end - i) * PAGE_SIZE;
        if (pages[i].data && pwrite(bench.fd, pages[i].data, size,
                                    pages[i].offset) != size) {
            fprintf(stderr, "%s: cannot write\n", opt.sink);
            exit(EXIT_FAILURE);
        }
    }
}

static void *image_writer_thread(void *opaque)
{
    ImageWriter *w = opaque;
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    bool copy = g_str_equal(opt.sink, "memory");
    g_autofree uint8_t *memory = g_malloc(ARRAY_SIZE(pages) * PAGE_SIZE);
    int64_t due = get_clock();
    size_t i, n;

    while ((n = snapshot_ram_next(bench.ram, pages))) {
        uint64_t before = w->data_pages;

        for (i = 0; i < n; i++) {
            check_page(w, &pages[i]);
            if (copy && pages[i].data) {
                memcpy(memory + i * PAGE_SIZE, pages[i].data, PAGE_SIZE);
            }
        }
        if (bench.fd >= 0) {
            write_file(pages, n);
        }
        if (opt.sink_rate) {
            due += (w->data_pages - before) * PAGE_SIZE * opt.writers *
                   NANOSECONDS_PER_SECOND / MiB / opt.sink_rate;
            sleep_until(due);
        }
        snapshot_ram_written(bench.ram, pages, n);
    }
    return NULL;
}

/* As background snapshots have it, but without pauses for the guest's sake */
static void *mender_thread(void *opaque)
{
    do {
        while (snapshot_ram_mend(bench.ram)) {
            ;
        }
    } while (snapshot_ram_mend_wait(bench.ram));
    return NULL;
}

static void make_ram(void)
{
    size_t size = opt.ram_mib * MiB;
    size_t page;

    bench.host = qemu_anon_ram_alloc(size, NULL, false, true);
    g_assert_nonnull(bench.host);
    qemu_madvise(bench.host, size,
                 opt.thp ? QEMU_MADV_HUGEPAGE : QEMU_MADV_NOHUGEPAGE);
    bench.num_pages = size / PAGE_SIZE;
    bench.touched = opt.touch_mib * (MiB / PAGE_SIZE);
    bench.written = bitmap_new(bench.num_pages);
    bench.stopped = bitmap_new(bench.num_pages);
    for (page = 0; page < bench.touched; page++) {
        *(uint64_t *)page_word(page) = content(page, BEFORE);
    }
}

static size_t malloc_size(void)
{
#ifdef HAVE_MALLINFO2
    struct mallinfo2 info = mallinfo2();

    return info.uordblks + info.hblkhd;
#else
    return 0;
#endif
}

static void set_up(unsigned long *save)
{
    static WriteTrapOps ops;
    Error *err = NULL;

    ops = *bench.trap;
    ops.new = bench_trap_new;
    bench.ram = snapshot_ram_new(&(SnapshotRAMConfig) {
        .page_size = PAGE_SIZE,
        .buffer_size = opt.buffer_mib * MiB,
        .detect_zero = true,
        .arm_ahead = true,
        .busy_ns = BUSY_NS,
        .stall_limit_ms = STALL_LIMIT_MS,
    }, &error_fatal);
    bitmap_set(save, 0, bench.num_pages);
    snapshot_ram_add_block(bench.ram, &(SnapshotBlockInfo) {
        .name = "ram",
        .host = bench.host,
        .size = bench.num_pages * PAGE_SIZE,
        .host_page_size = qemu_real_host_page_size(),
        .writable = true,
        .fd = -1,
        .save = save,
    }, &error_fatal);
    if (!snapshot_ram_set_trap(bench.ram, &ops, &err)) {
        error_report_err(err);
        exit(EXIT_SKIPPED);
    }
}

static void run(void)
{
    g_autofree VCPU *vcpus = g_new0(VCPU, opt.vcpus);
    g_autofree ImageWriter *writers = g_new0(ImageWriter, opt.writers);
    g_autofree Histogram *all = g_new0(Histogram, 1);
    g_autofree Histogram *stopped = g_new0(Histogram, 1);
    g_autofree unsigned long *save = NULL;
    uint64_t pages = 0, data_pages = 0, sum = 0;
    int64_t start, set_up_ns, ahead_ns, arm_ns, save_ns, stop_ns;
    SnapshotRAMStats stats;
    QemuThread mender;
    size_t memory;
    double mib;
    int i;

    make_ram();
    memory = malloc_size();
    start = get_clock();
    save = bitmap_new(bench.num_pages);
    set_up(save);
    set_up_ns = get_clock() - start;
    memory = malloc_size() - memory;

    qemu_event_init(&bench.thaw, false);
    for (i = 0; i < opt.vcpus; i++) {
        vcpus[i].random = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
        qemu_thread_create(&vcpus[i].thread, "vcpu", vcpu_thread, &vcpus[i],
                           QEMU_THREAD_JOINABLE);
    }
    g_usleep(opt.vcpus ? opt.warm_ms * 1000 : 0);
    start = get_clock();
    snapshot_ram_arm_ahead(bench.ram, &error_fatal);
    ahead_ns = get_clock() - start;
    qatomic_set(&bench.phase, FREEZE);
    while (qatomic_read(&bench.num_frozen) < opt.vcpus) {
        g_usleep(100);
    }

    start = get_clock();
    snapshot_ram_arm(bench.ram, &error_fatal);
    arm_ns = get_clock() - start;

    if (opt.locks) {
        lock_counts_begin(bench.ram);
    }
    qatomic_store_release(&bench.phase, AFTER);
    qemu_event_set(&bench.thaw);
    start = get_clock();
    for (i = 0; i < opt.writers; i++) {
        qemu_thread_create(&writers[i].thread, "writer", image_writer_thread,
                           &writers[i], QEMU_THREAD_JOINABLE);
    }
    if (opt.thp) {
        qemu_thread_create(&mender, "mender", mender_thread, NULL,
                           QEMU_THREAD_JOINABLE);
    }
    for (i = 0; i < opt.writers; i++) {
        qemu_thread_join(&writers[i].thread);
        pages += writers[i].pages;
        data_pages += writers[i].data_pages;
        sum += writers[i].sum;
    }
    save_ns = get_clock() - start;
    lock_counts_end();
    start = get_clock();
    snapshot_ram_stop(bench.ram);
    stop_ns = get_clock() - start;
    qatomic_set(&bench.phase, END);
    for (i = 0; i < opt.vcpus; i++) {
        qemu_thread_join(&vcpus[i].thread);
        histogram_merge(all, &vcpus[i].all);
        histogram_merge(stopped, &vcpus[i].stopped);
    }
    if (opt.thp) {
        qemu_thread_join(&mender);
    }
    if (snapshot_ram_failure(bench.ram)) {
        fprintf(stderr, "%s\n", snapshot_ram_failure(bench.ram));
        exit(EXIT_FAILURE);
    }
    g_assert_cmpuint(pages, ==, bench.num_pages);
    g_assert_cmpuint(sum, ==, bench.num_pages * (bench.num_pages - 1) / 2);

    snapshot_ram_get_stats(bench.ram, &stats);
    mib = data_pages * PAGE_SIZE / (double)MiB;
    printf("{\"ram_mib\": %d, \"touched_mib\": %d, \"thp\": %s, \"vcpus\": %d, "
           "\"writers\": %d, \"buffer_mib\": %d, \"sink\": \"%s\", "
           "\"trap\": \"%s\", \"set_up_ms\": %.2f, "
           "\"arm_ahead_ms\": %.2f, \"arm_ms\": %.2f, "
           "\"save_ms\": %.2f, \"stop_ms\": %.2f, \"data_mib\": %.0f, "
           "\"mib_s\": %.0f, \"faults\": %" PRIu64 ", \"faults_s\": %.0f, "
           "\"fault_pages\": %" PRIu64 ", \"waits\": %" PRIu64 ", "
           "\"peak_pages\": %zu, \"table_kib\": %zu",
           opt.ram_mib, opt.touch_mib, opt.thp ? "true" : "false", opt.vcpus,
           opt.writers, opt.buffer_mib, opt.sink, opt.trap, set_up_ns / 1e6,
           ahead_ns / 1e6, arm_ns / 1e6, save_ns / 1e6, stop_ns / 1e6, mib,
           mib / (save_ns / 1e9), stats.faults, stats.faults / (save_ns / 1e9),
           stats.fault_pages, stats.waits, stats.buffer_peak, memory / 1024);
    histogram_print("writes", all);
    histogram_print("stopped", stopped);
    if (opt.locks) {
        lock_counts_print();
    }
    printf("}\n");
    snapshot_ram_free(bench.ram);
    qemu_anon_ram_free(bench.host, opt.ram_mib * MiB);
    g_free(bench.written);
    g_free(bench.stopped);
}

int main(int argc, char **argv)
{
    GOptionContext *context = g_option_context_new("- save RAM without a "
                                                   "guest");
    GError *err = NULL;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &err)) {
        fprintf(stderr, "%s\n", err->message);
        return EXIT_FAILURE;
    }
    g_option_context_free(context);
    opt.trap = opt.trap ?: g_strdup("mprotect");
    opt.pattern = opt.pattern ?: g_strdup("random");
    opt.sink = opt.sink ?: g_strdup("none");
    opt.touch_mib = opt.touch_mib < 0 ? opt.ram_mib : opt.touch_mib;
    opt.set_mib = opt.set_mib < 0 ? opt.touch_mib : opt.set_mib;
    if (opt.ram_mib < 1 || opt.touch_mib > opt.ram_mib ||
        opt.set_mib > opt.touch_mib || opt.vcpus < 0 || opt.writers < 1 ||
        opt.buffer_mib < 1 || (opt.vcpus && !opt.set_mib)) {
        fprintf(stderr, "Sizes or numbers make no sense\n");
        return EXIT_FAILURE;
    }
    if (!g_str_equal(opt.sink, "none") && !g_str_equal(opt.sink, "memory")) {
        bench.fd = open(opt.sink, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (bench.fd < 0) {
            fprintf(stderr, "%s: %s\n", opt.sink, strerror(errno));
            return EXIT_FAILURE;
        }
    }
    module_call_init(MODULE_INIT_MIGRATION);
    bench.trap = write_trap_find(opt.trap);
    if (!bench.trap) {
        fprintf(stderr, "No write trap '%s'\n", opt.trap);
        return EXIT_FAILURE;
    }
    run();
    return EXIT_SUCCESS;
}

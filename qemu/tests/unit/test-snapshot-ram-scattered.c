/*
 * Unit tests for the RAM of a background snapshot: islands of mprotect()
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Each is a mapping of its own, and a process may have but so many.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "../migration/snapshot-ram-internal.h"

#define PAGE_SIZE 4096

#define NUM_FAULTS 200000
#define SPARSE_SIZE (4 * GiB)

static size_t count_maps(void)
{
    FILE *f = fopen("/proc/self/maps", "r");
    size_t n = 0;
    int c;

    g_assert_nonnull(f);
    while ((c = getc_unlocked(f)) != EOF) {
        n += c == '\n';
    }
    fclose(f);
    return n;
}

static size_t max_maps(void)
{
    g_autofree char *text = NULL;
    uint64_t max;

    g_assert_true(g_file_get_contents("/proc/sys/vm/max_map_count", &text,
                                      NULL, NULL));
    g_assert_cmpint(qemu_strtou64(text, NULL, 10, &max), ==, -EINVAL);
    return max;
}

/* Enough for the way from an island to any unit, with so many islands */
#define NUM_SLOTS 8192

/* So many that fault-around does not get its sixteen: see page_buffer_take() */
#define NUM_HELD (NUM_SLOTS - NUM_SLOTS / 8 - 15)

/* Empty the buffer but for the slots that are held */
static void drain_zero(PageBuffer *buffer)
{
    uint32_t slots[64];
    size_t i, n;

    while ((n = page_buffer_dequeue(buffer, slots, 64, false))) {
        for (i = 0; i < n; i++) {
            /* Nobody had written there before */
            g_assert_true(page_buffer_entry(buffer, slots[i])->zero_pages);
        }
        page_buffer_give(buffer, slots, n);
    }
}

static void test_scattered(void)
{
    size_t num_pages = SPARSE_SIZE / PAGE_SIZE;
    size_t limit = max_maps();
    size_t before, peak = 0, next_look = 0;
    g_autofree unsigned long *save = bitmap_new(num_pages);
    g_autofree uint32_t *held = g_new(uint32_t, NUM_HELD);
    GRand *rand = g_rand_new_with_seed(g_test_rand_int());
    SnapshotRAM *ram = snapshot_ram_new(&(SnapshotRAMConfig) {
        .buffer_size = NUM_SLOTS * PAGE_SIZE,
        .page_size = PAGE_SIZE,
        .detect_zero = true,
        .busy_ns = INT64_MAX,
    }, &error_abort);
    PageBuffer *buffer = ram->buffer;
    SnapshotBlockInfo block = {
        .name = "sparse",
        .size = SPARSE_SIZE,
        .host_page_size = PAGE_SIZE,
        .writable = true,
        .fd = -1,
        .save = save,
    };
    SnapshotRAMStats stats;
    uint8_t *map, *host;
    bool waited;
    size_t page;

    /*
     * Memory that nobody has used yet, and without a neighbour that it could
     * share anything with: it comes in the most mappings
     */
    map = mmap(NULL, SPARSE_SIZE + 2 * PAGE_SIZE, PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_assert(map != MAP_FAILED);
    host = map + PAGE_SIZE;
    g_assert_cmpint(mprotect(host, SPARSE_SIZE, PROT_READ | PROT_WRITE), ==,
                    0);
    /* What does not exist at all would be released 2 MiB at a time */
    for (page = 0; page < num_pages; page += 2 * MiB / PAGE_SIZE) {
        host[page * PAGE_SIZE] = 1;
    }
    bitmap_set(save, 0, num_pages);
    block.host = host;
    snapshot_ram_add_block(ram, &block, &error_abort);
    g_assert_cmpuint(page_buffer_take(buffer, held, NUM_HELD, NUM_HELD, true, 0,
                                      &waited), ==, NUM_HELD);
    before = count_maps();
    snapshot_ram_set_trap(ram, write_trap_find("mprotect"), &error_abort);
    snapshot_ram_arm(ram, &error_abort);

    do {
        page = g_rand_int(rand) % num_pages;
        qatomic_set(host + page * PAGE_SIZE, 1);
        drain_zero(buffer);
        snapshot_ram_get_stats(ram, &stats);
        if (stats.faults >= next_look) {
            size_t maps = count_maps();

            /* The rest of the process has room left */
            g_assert_cmpuint(maps, <, limit - limit / 5);
            peak = MAX(peak, maps);
            next_look += 10000;
            /* Written pages are released, so nobody misses them */
            g_assert_cmpint(madvise(host, SPARSE_SIZE, MADV_DONTNEED), ==, 0);
        }
        g_assert_cmpstr(snapshot_ram_failure(ram), ==, NULL);
    } while (stats.faults < NUM_FAULTS);

    g_test_message("%" PRIu64 " faults, %" PRIu64 " pages, %zu mappings of %zu",
                   stats.faults, stats.fault_pages, peak, limit);
    /* What was there was used */
    g_assert_cmpuint(peak, >, MIN(limit, NUM_FAULTS) / 2);

    snapshot_ram_stop(ram);
    snapshot_ram_free(ram);
    /* It has not cost the process any of them for good */
    g_assert_cmpuint(count_maps(), <=, before + 10);

    munmap(map, SPARSE_SIZE + 2 * PAGE_SIZE);
    g_rand_free(rand);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_MIGRATION);
    if (sizeof(void *) >= 8) {
        g_test_add_func("/snapshot-ram/islands/scattered", test_scattered);
    }
    return g_test_run();
}

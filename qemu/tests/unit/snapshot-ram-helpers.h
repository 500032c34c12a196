/*
 * RAM that unit tests take a snapshot of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef TESTS_SNAPSHOT_RAM_HELPERS_H
#define TESTS_SNAPSHOT_RAM_HELPERS_H

#include "../migration/page-buffer.h"
#include "../migration/snapshot-ram.h"

#define PAGE_SIZE 4096

typedef struct TestBlock {
    char name[16];
    uint8_t *host;
    size_t num_pages;
    /* Which pages are to be saved; all, if the test does not clear any */
    unsigned long *save;
    /* What the image must hold: the memory as it was when it was armed */
    uint8_t *expected;
    /* How often each page came out */
    uint8_t *seen;
} TestBlock;

typedef struct TestRAM {
    SnapshotRAM *ram;
    /* Its own */
    PageBuffer *buffer;
    TestBlock *blocks[8];
    size_t num_blocks;
    /* Pages that came out so far */
    size_t saved;
    size_t saved_zero;
} TestRAM;

/* Whether the calling thread is urgent, see SnapshotRAMConfig */
extern __thread bool test_is_urgent;

/* For how long such threads may wait */
#define TEST_URGENT_LIMIT_MS 100

/**
 * test_map: memory for blocks, aligned to 2 MiB
 *
 * Each page holds its own data; each fifth one is all zeroes.
 */
uint8_t *test_map(size_t num_pages);
void test_unmap(uint8_t *host, size_t num_pages);

/*
 * Returns: an empty table, with a buffer of so many pages; it takes all faults
 * for a busy guest's, or those within @busy_ns of the last one
 */
TestRAM *test_ram_new(size_t num_slots, bool detect_zero, int stall_limit_ms);
TestRAM *test_ram_new_busy(size_t num_slots, bool detect_zero, int64_t busy_ns,
                           int stall_limit_ms);

/* Returns: a block of @num_pages that has been added to the table */
TestBlock *test_ram_add(TestRAM *t, uint8_t *host, size_t num_pages,
                        size_t host_page_size, bool writable);

/* The same; of @like, only what a block is like is looked at */
TestBlock *test_ram_add_like(TestRAM *t, uint8_t *host, size_t num_pages,
                             SnapshotBlockInfo like);

/* Copy what the blocks hold, and arm them */
void test_ram_arm(TestRAM *t, const WriteTrapOps *trap);

/**
 * test_ram_take: check @n pages that were handed out, and give them back
 *
 * Returns: @n
 */
size_t test_ram_take(TestRAM *t, const SnapshotPage *pages, size_t n);

/**
 * test_ram_drain: take pages that are queued out of the buffer and check them
 *
 * Returns: how many slots they took; 0 if none is queued
 */
size_t test_ram_drain(TestRAM *t);

/* Have the scanner save a run and queue it.  Returns: whether it has. */
bool test_ram_scan(TestRAM *t);

/**
 * test_ram_next: take pages as who writes the image does, and check them
 *
 * Returns: false if there are no more
 */
bool test_ram_next(TestRAM *t);

/* Do so until all is saved; @pause_us after each few pages */
void test_ram_save(TestRAM *t, int pause_us);

/* Assert that each page that is to be saved came out once */
void test_ram_check(TestRAM *t);

/* Lift the traps and free all but the memory */
void test_ram_free(TestRAM *t);

SnapshotRAMStats test_ram_stats(TestRAM *t);

/* Returns: how many of them are stalls, however long */
uint64_t test_ram_stalls(const SnapshotRAMStats *stats);

/* Threads that write everywhere; no page is zero for long */
typedef struct TestScribblers TestScribblers;

TestScribblers *test_scribblers_start(size_t n, uint8_t *host,
                                      size_t num_pages);

/* Wait until each of them has written */
void test_scribblers_wait(TestScribblers *scribblers);

/* Returns: how often they have written */
uint64_t test_scribblers_stop(TestScribblers *scribblers);

#endif

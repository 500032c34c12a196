/*
 * A write trap that stops nobody, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Tests tell it of each write with fake_write(), and it tells them what was
 * armed and released.
 */
#ifndef TESTS_FAKE_WRITE_TRAP_H
#define TESTS_FAKE_WRITE_TRAP_H

#include "qemu/thread.h"
#include "../migration/write-trap.h"

#define FAKE_PAGE_SIZE 4096

typedef struct FakeTrap {
    WriteTrap common;

    /* Set by the test before the trap is created; kept from then on */
    size_t max_islands;
    bool fail_new;
    int fail_add;               /* the call that fails, from 1 on */
    int fail_arm;               /* likewise, with half of the range armed */
    bool arms_again;            /* what is armed or was released, too */
    bool fail_release;          /* of less than what was armed with one call */
    void (*before_arm)(void *host, size_t size);
    void (*before_release)(void *host, size_t size);

    /* Set by new() */
    uint8_t *start;
    size_t size;
    WriteTrapFaultFn *fault;
    void *opaque;
    enum { UNKNOWN, ADDED, ARMED, RELEASED } *pages;

    /* Protects the rest */
    QemuMutex lock;
    int adds;
    int arms;
    int releases;
    size_t num_armed;           /* pages */
    size_t twice;               /* pages that were released more than once */
    size_t islands;
    size_t peak_islands;
    void *last_host;            /* of the last call to release() */
    size_t last_size;
    size_t num_prepared;        /* calls to prepare() */
    void *prepared[8];
} FakeTrap;

/* There is one at a time */
extern FakeTrap fake_trap;
extern const WriteTrapOps fake_trap_ops;
/* The same, but nothing is armed that does not exist */
extern const WriteTrapOps fake_trap_existing_ops;

/**
 * fake_write: do as if a thread wrote to an address
 *
 * Returns: whether the write is let through
 */
bool fake_write(void *host);

/* Returns: whether a page is armed */
bool fake_armed(void *host);

#endif

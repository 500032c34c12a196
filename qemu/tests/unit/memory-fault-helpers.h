/*
 * Memory whose accesses raise a signal, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef TESTS_MEMORY_FAULT_HELPERS_H
#define TESTS_MEMORY_FAULT_HELPERS_H

#include "qemu/memory-fault.h"

/* Bytes */
size_t fault_page_size(void);

/**
 * fault_map: map so many pages that raise a signal if they are written
 *
 * @sig: SIGSEGV or SIGBUS, as in the other functions
 */
uint8_t *fault_map(int sig, size_t num_pages);

/* Have a page raise the signal */
void fault_deny(int sig, void *host);

/* Have it raise none; also in signal context */
void fault_allow(void *host);

void write_byte(uint8_t *host);

/* A handler that allows the access, unless it is told that it is not its */
typedef struct Opener {
    MemoryFaultHandler handler;
    bool refuse;
    int calls;
    void *host;
    pthread_t thread;
} Opener;

void opener_add(Opener *o, int sig, void *start, size_t size);

/* Run a function in a thread made by qemu_thread_create(), to its end */
void in_thread(void *(*fn)(void *), void *opaque);

/* Returns: whether the calling thread blocks SIGBUS */
bool sigbus_blocked(void);

#ifdef CONFIG_LINUX
/**
 * send_memory_error: have the calling thread receive a SIGBUS like the host's
 *
 * @code: BUS_MCEERR_AO, for an error that may wait, or BUS_MCEERR_AR
 */
void send_memory_error(int code, void *host);
#endif

/**
 * killed_by: run a function in a process of its own
 *
 * Returns: the signal that kills it; 0 if it ends well
 */
int killed_by(void (*fn)(void));

#endif

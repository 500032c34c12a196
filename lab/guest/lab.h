/*
 * What the guest programs share: lines for the host, and page contents that
 * tell where and when they were written.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_H
#define LAB_H

#include <err.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / sizeof(uint64_t))
#define STEP 0x9e3779b97f4a7c15ull

/* Print one line with one write(), so that the lines of threads never mix. */
static inline __attribute__((format(printf, 1, 2)))
void say(const char *format, ...)
{
    char line[512];
    va_list args;
    int len;

    va_start(args, format);
    len = vsnprintf(line, sizeof(line) - 1, format, args);
    va_end(args);
    if (len > (int)sizeof(line) - 2) {
        len = sizeof(line) - 2;
    }
    line[len++] = '\n';
    if (write(STDOUT_FILENO, line, len) != len) {
        err(1, "write to the console");
    }
}

/*
 * The first word of the page @page of owner @owner in round @round; word n of
 * the page is this plus n * STEP.
 */
static inline uint64_t page_seed(uint64_t owner, uint64_t page, uint64_t round)
{
    uint64_t x = (owner << 56) ^ (page << 24) ^ round;

    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline void page_fill(uint64_t *page, uint64_t seed)
{
    for (unsigned i = 0; i < WORDS; i++, seed += STEP) {
        page[i] = seed;
    }
}

/* The index of the first word that is not what @seed says, or -1. */
static inline int page_verify(const uint64_t *page, uint64_t seed)
{
    for (unsigned i = 0; i < WORDS; i++, seed += STEP) {
        if (page[i] != seed) {
            return i;
        }
    }
    return -1;
}

/* @bytes of populated memory; exits if the guest has not that much. */
static inline void *get_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (p == MAP_FAILED) {
        err(1, "mmap of %zu bytes", bytes);
    }
    return p;
}

static inline uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

/* Tell the host the number of operations so far, if it was 20 ms ago. */
static inline void report_operations(uint64_t operations)
{
    static uint64_t due;
    uint64_t now = now_ns();

    if (now >= due) {
        due = now + 20000000;
        say("ops %lu", (unsigned long)operations);
    }
}

#endif

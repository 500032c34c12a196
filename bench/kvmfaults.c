/*
 * A guest without a system: times its writes to places that are far from each
 * other, so that a snapshot's write trap stops each of them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Of each pass over all places it prints, in TSC cycles of a write,
 *
 *   kvm pass=<n> p50=<n> p90=<n>
 */
#include "bare.h"

/* Behind what the scanner has saved by then; see kvm */
#define AREA (160u << 20)
#define SIZE (64u << 20)
#define STEP (128u << 10)
#define WRITES (SIZE / STEP)
#define PAGE 4096u
/* From one pass to the next, in cycles: a small part of it is writing */
#define PAUSE (1u << 30)

static uint32_t taken[WRITES];

static uint32_t tsc(void)
{
    uint32_t low, high;

    asm volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) : : "memory");
    return low;
}

static void sort(uint32_t *values, unsigned int count)
{
    for (unsigned int i = 1; i < count; i++) {
        uint32_t value = values[i];
        unsigned int at = i;

        for (; at && values[at - 1] > value; at--) {
            values[at] = values[at - 1];
        }
        values[at] = value;
    }
}

static void run(void)
{
    /* No zero pages: each is copied whole. */
    for (uint32_t at = AREA; at < AREA + SIZE; at += PAGE) {
        *(volatile uint32_t *)at = at;
    }
    say("guest ready\n");
    for (uint32_t pass = 1;; pass++) {
        uint32_t begin = tsc();

        for (unsigned int i = 0; i < WRITES; i++) {
            uint32_t before = tsc();

            *(volatile uint32_t *)(AREA + i * STEP) = pass;
            taken[i] = tsc() - before;
        }
        sort(taken, WRITES);
        say_number("kvm pass=", pass);
        say_number(" p50=", taken[WRITES / 2]);
        say_number(" p90=", taken[WRITES * 9 / 10]);
        say("\n");
        while (tsc() - begin < PAUSE) {
        }
    }
}

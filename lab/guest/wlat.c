/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Measures how long single memory writes take, inside the guest.
 *
 *   wlat RATE AREA_MB MAX_SAMPLES
 *
 * Writes one word to RATE random pages a second (0: as fast as possible) of an
 * area of AREA_MB and takes the time of each write with the TSC, which needs
 * neither a system call nor a device.  Each SIGUSR1 ends a window and begins
 * the next; the program says "wlat window <n>" when it has done so.  SIGTERM
 * ends the last one and prints, for each window n,
 *
 *   wlat n <window> <seconds> <writes> <samples that follow>
 *   wlat s <time of a write in ns> ...
 *   wlat r <writes in each successive 100 ms> ...
 *
 * and "wlat end".  At full speed only writes of 20 us or more are kept as
 * samples.  Samples beyond MAX_SAMPLES of a window are counted, not kept.
 */
#include <errno.h>
#include <signal.h>
#include <x86intrin.h>

#include "lab.h"

#define WINDOWS 8u
#define TENTHS 6000u
#define FAST_SAMPLE_NS 20000u

typedef struct Window {
    uint64_t begin, end;
    uint64_t writes;
    size_t samples;
    uint32_t *ns;
    uint32_t tenths[TENTHS];
} Window;

static Window windows[WINDOWS];
static volatile sig_atomic_t marks, over;
static double tsc_per_ns;

static void on_mark(int unused)
{
    (void)unused;
    marks = marks + 1;
}

static void on_end(int unused)
{
    (void)unused;
    over = 1;
}

static uint64_t tsc(void)
{
    unsigned aux;

    return __rdtscp(&aux);
}

static void calibrate(void)
{
    uint64_t ns = now_ns(), ticks = tsc();

    usleep(500000);
    ticks = tsc() - ticks;
    tsc_per_ns = (double)ticks / (now_ns() - ns);
}

static void print_numbers(const char *kind, const uint32_t *n, size_t count)
{
    char line[480];

    for (size_t i = 0; i < count;) {
        int len = 0;

        for (; i < count && len < (int)sizeof(line) - 16; i++) {
            len += snprintf(line + len, sizeof(line) - len, " %u", n[i]);
        }
        say("wlat %s%s", kind, line);
    }
}

static void report(int last)
{
    for (int i = 0; i <= last; i++) {
        Window *w = &windows[i];
        double seconds = (w->end - w->begin) / tsc_per_ns / 1e9;
        size_t tenths = seconds * 10;

        say("wlat n %d %.3f %lu %zu", i, seconds, (unsigned long)w->writes,
            w->samples);
        print_numbers("s", w->ns, w->samples);
        print_numbers("r", w->tenths, tenths < TENTHS ? tenths : TENTHS);
    }
    say("wlat end");
}

int main(int argc, char **argv)
{
    unsigned rate = argc > 3 ? atoi(argv[1]) : 0;
    size_t pages = argc > 3 ? (size_t)atoi(argv[2]) * 256 : 0;
    size_t max_samples = argc > 3 ? atoi(argv[3]) : 0;
    uint64_t x = STEP, due, tenth;
    volatile uint64_t *area;
    Window *w = windows;
    int window = 0;

    if (!pages || !max_samples) {
        errx(1, "usage: wlat RATE AREA_MB MAX_SAMPLES");
    }
    area = get_memory(pages * PAGE);
    for (size_t i = 0; i < pages; i++) {
        /* No zero pages: the snapshot has to carry each of them whole. */
        page_fill((uint64_t *)area + i * WORDS, page_seed(1, i, 0));
    }
    for (unsigned i = 0; i < WINDOWS; i++) {
        windows[i].ns = get_memory(max_samples * sizeof(uint32_t));
        memset(windows[i].ns, 1, max_samples * sizeof(uint32_t));
    }
    calibrate();
    tenth = 1e8 * tsc_per_ns;
    signal(SIGUSR1, on_mark);
    signal(SIGTERM, on_end);
    say("wlat window 0");
    due = now_ns();
    w->begin = tsc();
    while (!over) {
        volatile uint64_t *word;
        uint64_t start, end, ns, t;

        if (rate) {
            struct timespec ts;

            due += 1000000000 / rate;
            ts = (struct timespec) { due / 1000000000, due % 1000000000 };
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
        }
        if (marks != window && window + 1 < (int)WINDOWS) {
            w->end = tsc();
            window++;
            w = &windows[window];
            w->begin = tsc();
            say("wlat window %d", window);
        }
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word = area + x % pages * WORDS + (x >> 40) % WORDS;
        start = tsc();
        *word = x;
        end = tsc();
        ns = (end - start) / tsc_per_ns;
        w->writes++;
        t = (end - w->begin) / tenth;
        if (t < TENTHS) {
            w->tenths[t]++;
        }
        if ((rate || ns >= FAST_SAMPLE_NS) && w->samples < max_samples) {
            w->ns[w->samples++] = ns < UINT32_MAX ? ns : UINT32_MAX;
        }
    }
    w->end = tsc();
    report(window);
    return 0;
}

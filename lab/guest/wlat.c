/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Measures how long single memory writes take, inside the guest.
 *
 *   wlat RATE AREA_MB STRIDE MAX_SAMPLES FILL_MB
 *
 * Writes one word to RATE pages a second (0: as fast as possible) of an area
 * of AREA_MB, in random order (STRIDE 0) or to every STRIDE-th page until all
 * have had their turn.  The word is read just before, so that the write finds
 * its address translated, and timed with the TSC, which needs neither a system
 * call nor a device: a write that nothing stops takes well below SLOW_NS.
 * FILL_MB more are filled once, and not touched again.
 *
 * Each SIGUSR1 ends a window and begins the next; the program says "wlat
 * window <n>" when it has done so.  SIGTERM ends the last one and prints, for
 * each window n,
 *
 *   wlat n <window> <seconds> <writes> <slow firsts> <slow agains>
 *   wlat h <writes of 0 to 99 ns> <100 to 199 ns> ... <up to SLOW_NS>
 *   wlat f <ns> ...   each slow write, SLOW_NS or more, that was the first slow
 *                     one to its page in this window
 *   wlat a <ns> ...   each other slow write
 *   wlat r <writes in each successive 100 ms>
 *   wlat m <the longest write, in ns, of each successive 10 ms>
 *
 * and "wlat end".  A write trap stops no page twice, so "f" has each write that
 * one stopped for that long.  Of f and a, MAX_SAMPLES each are kept, more are
 * counted.
 *
 * About each half millisecond it reads the A20 gate's port, which changes
 * nothing, but can be traced by the host: the guest's own clocks stand still
 * while it is stopped.
 */
#include <errno.h>
#include <signal.h>
#include <sys/io.h>
#include <x86intrin.h>

#include "lab.h"

#define WINDOWS 3u
#define TENTHS 6000u
#define HUNDREDTHS (10 * TENTHS)
#define SLOW_NS 3000u
#define BUCKET_NS 100u
#define BUCKETS (SLOW_NS / BUCKET_NS)
#define LIFE_PORT 0x92
#define LIFE_NS 500000u

typedef struct Samples {
    size_t count;
    uint32_t *ns;
} Samples;

typedef struct Window {
    uint64_t begin, end;
    uint64_t writes;
    uint32_t fast[BUCKETS];
    Samples first, again;
    uint32_t tenths[TENTHS];
    uint32_t longest[HUNDREDTHS];
} Window;

static Window windows[WINDOWS];
static size_t max_samples;
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

static void samples_init(Samples *s)
{
    s->ns = get_memory(max_samples * sizeof(uint32_t));
    memset(s->ns, 1, max_samples * sizeof(uint32_t));
}

static void samples_add(Samples *s, uint64_t ns)
{
    if (s->count < max_samples) {
        s->ns[s->count] = ns < UINT32_MAX ? ns : UINT32_MAX;
    }
    s->count++;
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

static void print_samples(const char *kind, const Samples *s)
{
    print_numbers(kind, s->ns, s->count < max_samples ? s->count : max_samples);
}

static void report(int last)
{
    for (int i = 0; i <= last; i++) {
        Window *w = &windows[i];
        double seconds = (w->end - w->begin) / tsc_per_ns / 1e9;
        size_t tenths = seconds * 10, hundredths = seconds * 100;

        say("wlat n %d %.3f %lu %zu %zu", i, seconds,
            (unsigned long)w->writes, w->first.count, w->again.count);
        print_numbers("h", w->fast, BUCKETS);
        print_samples("f", &w->first);
        print_samples("a", &w->again);
        print_numbers("r", w->tenths, tenths < TENTHS ? tenths : TENTHS);
        print_numbers("m", w->longest,
                      hundredths < HUNDREDTHS ? hundredths : HUNDREDTHS);
    }
    say("wlat end");
}

/* No zero pages: a snapshot has to carry each of them whole. */
static uint64_t *get_filled(size_t pages)
{
    uint64_t *area = get_memory(pages * PAGE);

    for (size_t i = 0; i < pages; i++) {
        page_fill(area + i * WORDS, page_seed(1, i, 0));
    }
    return area;
}

/* The page to write to next; @x is a new random number, @last the last page. */
static size_t next_page(size_t last, size_t pages, unsigned stride, uint64_t x)
{
    if (!stride) {
        return x % pages;
    }
    last += stride;
    /* The next pass begins one page further. */
    return last < pages ? last : (last + 1) % stride;
}

int main(int argc, char **argv)
{
    unsigned rate = argc > 5 ? atoi(argv[1]) : 0;
    size_t pages = argc > 5 ? (size_t)atoi(argv[2]) * 256 : 0;
    unsigned stride = argc > 5 ? atoi(argv[3]) : 0;
    size_t more = argc > 5 ? (size_t)atoi(argv[5]) * 256 : 0;
    uint64_t x = STEP, due, life = 0, hundredth, life_ticks;
    volatile uint64_t *area;
    uint8_t *slow_in;
    Window *w = windows;
    size_t page = 0;
    int window = 0;

    max_samples = argc > 5 ? atoi(argv[4]) : 0;
    if (!pages || !max_samples || (stride && pages % stride)) {
        errx(1, "usage: wlat RATE AREA_MB STRIDE MAX_SAMPLES FILL_MB");
    }
    if (ioperm(LIFE_PORT, 1, 1)) {
        err(1, "ioperm");
    }
    area = get_filled(pages);
    if (more) {
        get_filled(more);
    }
    /* The last window in which a write to the page was slow */
    slow_in = get_memory(pages);
    memset(slow_in, UINT8_MAX, pages);
    for (unsigned i = 0; i < WINDOWS; i++) {
        samples_init(&windows[i].first);
        samples_init(&windows[i].again);
    }
    calibrate();
    hundredth = 1e7 * tsc_per_ns;
    life_ticks = LIFE_NS * tsc_per_ns;
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
        page = next_page(page, pages, stride, x);
        word = area + page * WORDS + (x >> 40) % WORDS;
        (void)*word;
        /* TCG lets interrupts in behind this instruction: those that wait. */
        tsc();
        start = tsc();
        *word = x;
        end = tsc();
        ns = (end - start) / tsc_per_ns;
        w->writes++;
        t = (end - w->begin) / hundredth;
        if (t < HUNDREDTHS) {
            w->tenths[t / 10]++;
            if (ns > w->longest[t]) {
                w->longest[t] = ns < UINT32_MAX ? ns : UINT32_MAX;
            }
        }
        if (ns < SLOW_NS) {
            w->fast[ns / BUCKET_NS]++;
        } else if (slow_in[page] != window) {
            slow_in[page] = window;
            samples_add(&w->first, ns);
        } else {
            samples_add(&w->again, ns);
        }
        if (end - life > life_ticks) {
            inb(LIFE_PORT);
            life = end;
        }
    }
    w->end = tsc();
    report(window);
    return 0;
}

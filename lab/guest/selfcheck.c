/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest memory workload that checks itself.
 *
 *   selfcheck THREADS WRITE_MB STATIC_MB [PAUSE_US [STRIDE]]
 *
 * Each thread owns a part of WRITE_MB and of STATIC_MB.  In round r it visits
 * each of its pages once, expects there what round r - 1 wrote and writes what
 * round r says; odd rounds walk in order, even ones jump about; with STRIDE,
 * all take every STRIDE-th page, then those next to these, and so on.  The
 * position in the round and the round's number live in the thread's registers
 * and stack, so a page from any other moment is noticed within one round.  The
 * static part is only read.  PAUSE_US of sleep after each 64 pages make the
 * writer a slow one.
 *
 * Threads also draw tickets from one counter and sign a ring of pages in
 * ticket order: an image in which pages of several threads are of different
 * moments breaks that order.
 *
 * Prints ten times a second
 *   self round=<rounds done by the slowest thread> pages=<pages written> ok
 * and for each mismatch a line with BAD in it, after which its thread ends.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "lab.h"

#define BATCH 64u
#define SLOTS 32u
#define TICKET_PATIENCE_NS 10000000000ull
#define STATIC_OWNER 0x80u
#define MAX_THREADS 64u

typedef struct Worker {
    pthread_t thread;
    unsigned id;
    uint64_t *area;
    size_t pages;
    uint64_t *still;
    size_t still_pages;
    atomic_ulong rounds;
    atomic_ulong written;
} Worker;

/* The counter and each slot of the ring have a page of their own. */
typedef struct TicketPage {
    _Alignas(PAGE) atomic_ulong value;
    char tag[8];
} TicketPage;

/* The tag is for the host, which damages images to see them refused. */
static TicketPage next_ticket = { .tag = "TICKETS" };
static TicketPage signed_by[SLOTS];
static atomic_int bad;
static unsigned pause_us;
static unsigned stride;

static void __attribute__((noreturn)) stop_bad(void)
{
    atomic_fetch_add(&bad, 1);
    pthread_exit(NULL);
}

static void check_ticket(unsigned id)
{
    unsigned long ticket = atomic_fetch_add(&next_ticket.value, 1);
    atomic_ulong *slot = &signed_by[ticket % SLOTS].value;
    unsigned long want = ticket - SLOTS, got;
    uint64_t since = 0;

    /* Whoever drew the slot's last ticket may not have come to sign yet. */
    while ((got = atomic_load(slot)) != want) {
        if ((long)(got - want) > 0 ||
            (since && now_ns() - since > TICKET_PATIENCE_NS)) {
            say("self BAD ticket: thread %u drew %lu, expected %ld in its "
                "slot, got %ld", id, ticket, (long)want, (long)got);
            stop_bad();
        }
        since = since ? since : now_ns();
        sched_yield();
    }
    atomic_store(slot, ticket);
}

static void visit(Worker *w, size_t page, uint64_t round)
{
    uint64_t *p = w->area + page * WORDS;
    uint64_t old = page_seed(w->id, page, round - 1);
    uint64_t new = page_seed(w->id, page, round);

    for (unsigned i = 0; i < WORDS; i++, old += STEP, new += STEP) {
        uint64_t got = p[i];

        if (got != old) {
            uint64_t seed = got - i * STEP;
            long behind;

            for (behind = -4; behind < 64; behind++) {
                if (seed == page_seed(w->id, page, round - 1 - behind)) {
                    break;
                }
            }
            say("self BAD page: thread %u page %zu word %u round %lu: "
                "expected %016lx got %016lx (%s%ld)", w->id, page, i,
                (unsigned long)round, (unsigned long)old, (unsigned long)got,
                behind < 64 ? "rounds behind: " : "of no near round, code ",
                behind);
            stop_bad();
        }
        p[i] = new;
    }
}

static void check_static(Worker *w)
{
    for (size_t page = 0; page < w->still_pages; page++) {
        uint64_t seed = page_seed(STATIC_OWNER + w->id, page, 0);
        int word = page_verify(w->still + page * WORDS, seed);

        if (word >= 0) {
            say("self BAD static page: thread %u page %zu word %d: "
                "expected %016lx got %016lx", w->id, page, word,
                (unsigned long)(seed + word * STEP),
                (unsigned long)w->still[page * WORDS + word]);
            stop_bad();
        }
    }
}

/* A step that visits each of @pages once: about the golden section of it. */
static size_t jump(size_t pages)
{
    size_t step = pages * 618 / 1000 + 1;

    for (;; step++) {
        size_t a = pages, b = step;

        while (b) {
            size_t rest = a % b;

            a = b;
            b = rest;
        }
        if (a == 1) {
            return step;
        }
    }
}

static void *work(void *opaque)
{
    Worker *w = opaque;
    size_t far = jump(w->pages ? w->pages : 1);

    for (uint64_t round = 1; ; round++) {
        size_t page = 0, step = stride ? stride : round % 2 ? 1 : far;

        for (size_t i = 0; i < w->pages; i++) {
            if (i % BATCH == 0) {
                check_ticket(w->id);
                atomic_fetch_add(&w->written, BATCH);
                if (pause_us) {
                    usleep(pause_us);
                }
            }
            visit(w, page, round);
            page = (page + step) % w->pages;
        }
        check_static(w);
        atomic_store(&w->rounds, round);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static Worker workers[MAX_THREADS];
    unsigned threads = argc > 3 ? atoi(argv[1]) : 0;

    if (threads < 1 || threads > MAX_THREADS) {
        errx(1, "usage: selfcheck THREADS(1-%u) WRITE_MB STATIC_MB "
             "[PAUSE_US [STRIDE]]", MAX_THREADS);
    }
    pause_us = argc > 4 ? atoi(argv[4]) : 0;
    stride = argc > 5 ? atoi(argv[5]) : 0;
    for (unsigned i = 0; i < SLOTS; i++) {
        atomic_store(&signed_by[i].value, (unsigned long)i - SLOTS);
    }
    /*
     * All is filled before the first thread starts: threads that read fresh
     * pages make each other flush their TLBs, and that crawls under TCG.
     */
    for (unsigned t = 0; t < threads; t++) {
        Worker *w = &workers[t];

        w->id = t;
        w->pages = (size_t)atoi(argv[2]) * (1 << 20) / PAGE / threads;
        if (stride) {
            /* So that the step after the last one is to page 1 */
            w->pages -= (w->pages + 1) % stride;
        }
        w->still_pages = (size_t)atoi(argv[3]) * (1 << 20) / PAGE / threads;
        w->area = w->pages ? get_memory(w->pages * PAGE) : NULL;
        w->still = w->still_pages ? get_memory(w->still_pages * PAGE) : NULL;
        for (size_t page = 0; page < w->pages; page++) {
            page_fill(w->area + page * WORDS, page_seed(t, page, 0));
        }
        for (size_t page = 0; page < w->still_pages; page++) {
            page_fill(w->still + page * WORDS,
                      page_seed(STATIC_OWNER + t, page, 0));
        }
    }
    for (unsigned t = 0; t < threads; t++) {
        if (pthread_create(&workers[t].thread, NULL, work, &workers[t])) {
            errx(1, "pthread_create");
        }
    }
    for (;;) {
        unsigned long rounds = -1ul, written = 0;

        usleep(100000);
        for (unsigned t = 0; t < threads; t++) {
            unsigned long r = atomic_load(&workers[t].rounds);

            rounds = r < rounds ? r : rounds;
            written += atomic_load(&workers[t].written);
        }
        if (atomic_load(&bad)) {
            say("self BAD: %d threads stopped", atomic_load(&bad));
        } else {
            say("self round=%lu pages=%lu ok", rounds, written);
        }
    }
}

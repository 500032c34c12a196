/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Takes a stream at a given pace, for lab/sink.py: moves it from standard
 * input to standard output.
 *
 *   drain CONTROL_FD STEP_MS
 *
 * Of each STEP_MS, it takes up to Control.burst bytes as fast as they come,
 * then nothing until the step is over; what was not used is lost.  Storage with
 * a limit does the same: Linux's io.max hands out its bytes for 100 ms at a
 * time, and writers of dirty pages are paused for up to 200 ms.
 *
 * A pipe is spliced, so that its bytes are copied at most once and cost next
 * to no CPU time that the guest may need.  If the input is a listening socket,
 * it is the first connection to it.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (1u << 20)
#define HELD_MS 5u

/* Shared with the parent, which may change @burst and @held at any time. */
typedef struct Control {
    _Atomic uint64_t received;
    _Atomic uint64_t burst;     /* bytes for each step; 0: no limit */
    _Atomic uint64_t held;      /* take nothing */
    _Atomic uint64_t cpu_ns;    /* what it cost, told at the end */
} Control;

/* When the present step ends, and what it may still take. */
static uint64_t step_ns, end, left;

static uint64_t time_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static void sleep_until(uint64_t ns)
{
    struct timespec ts = { ns / 1000000000, ns % 1000000000 };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

/* Move up to @bytes; how many it were, 0 at the end of the stream. */
static size_t move(size_t bytes)
{
    static char data[CHUNK];
    ssize_t got = splice(STDIN_FILENO, NULL, STDOUT_FILENO, NULL, bytes, 0);

    if (got < 0 && errno == EINVAL) {
        /* Not a pipe */
        got = read(STDIN_FILENO, data, bytes);
        for (ssize_t done = 0, n; done < got; done += n) {
            n = write(STDOUT_FILENO, data + done, got - done);
            if (n < 0) {
                err(1, "write");
            }
        }
    }
    if (got < 0) {
        err(1, "input");
    }
    return got;
}

/* If the step is over, begin the one that is now; unused ones are lost. */
static void next_step(uint64_t burst)
{
    uint64_t now = time_ns(CLOCK_MONOTONIC);

    if (now >= end) {
        end += (now - end) / step_ns * step_ns + step_ns;
        left = burst;
    }
}

int main(int argc, char **argv)
{
    Control *control;
    int connection;

    if (argc != 3) {
        errx(1, "usage: drain CONTROL_FD STEP_MS");
    }
    control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED,
                   atoi(argv[1]), 0);
    if (control == MAP_FAILED) {
        err(1, "control");
    }
    connection = accept(STDIN_FILENO, NULL, NULL);
    if (connection >= 0) {
        dup2(connection, STDIN_FILENO);
        close(connection);
    }
    step_ns = strtoull(argv[2], NULL, 10) * 1000000;
    end = time_ns(CLOCK_MONOTONIC);
    for (;;) {
        uint64_t burst;
        size_t got;

        while (control->held) {
            sleep_until(time_ns(CLOCK_MONOTONIC) + HELD_MS * 1000000);
        }
        burst = control->burst;
        if (burst && !left) {
            sleep_until(end);
            next_step(burst);
        }
        got = move(burst && left < CHUNK ? left : CHUNK);
        if (!got) {
            control->cpu_ns = time_ns(CLOCK_PROCESS_CPUTIME_ID);
            return 0;
        }
        control->received += got;
        /* It may have waited: what came counts for the step it came in. */
        next_step(burst);
        left -= left < got ? left : got;
    }
}

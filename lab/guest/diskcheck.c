/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A disk workload that checks itself.
 *
 *   diskcheck DEVICE DISK_MB RING_MB
 *
 * Reads and writes random blocks of DEVICE with O_DIRECT for ever.  What each
 * block must hold is kept in memory, so the disk and the memory of a restored
 * guest must be of one moment.  The buffers for reading are a ring of RING_MB
 * which this program never writes to: in a snapshot, the device is the first
 * to write there.  A read that reported success without arriving leaves the
 * ring's older contents, which name another block or version.
 *
 * Prints ten times a second
 *   disk DEVICE ios=<reads and writes done> ok
 * or, at the first mismatch or failed request, a line with BAD in it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>

#include "lab.h"

#define MAX_PAGES 16u
#define OWNER 0xd1u

static uint32_t *versions;

static uint64_t random_next(void)
{
    static uint64_t x = STEP;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

static void __attribute__((noreturn)) fail(const char *what, size_t page,
                                           size_t pages, ssize_t got)
{
    say("disk BAD %s: %zu pages at page %zu: returned %zd: %s", what, pages,
        page, got, got < 0 ? strerror(errno) : "no error");
    exit(1);
}

static void disk_read(int fd, uint64_t *buffer, size_t page, size_t pages)
{
    ssize_t got = pread(fd, buffer, pages * PAGE, page * PAGE);

    if (got != (ssize_t)(pages * PAGE)) {
        fail("read", page, pages, got);
    }
    for (size_t i = 0; i < pages; i++) {
        uint64_t seed = page_seed(OWNER, page + i, versions[page + i]);
        int word = page_verify(buffer + i * WORDS, seed);

        if (word >= 0) {
            say("disk BAD contents: page %zu (%zu of a read of %zu) version "
                "%u word %d: expected %016lx got %016lx", page + i, i, pages,
                versions[page + i], word, (unsigned long)(seed + word * STEP),
                (unsigned long)buffer[i * WORDS + word]);
            exit(1);
        }
    }
}

static void disk_write(int fd, uint64_t *buffer, size_t page, size_t pages)
{
    ssize_t got;

    for (size_t i = 0; i < pages; i++) {
        page_fill(buffer + i * WORDS,
                  page_seed(OWNER, page + i, ++versions[page + i]));
    }
    got = pwrite(fd, buffer, pages * PAGE, page * PAGE);
    if (got != (ssize_t)(pages * PAGE)) {
        fail("write", page, pages, got);
    }
}

int main(int argc, char **argv)
{
    size_t disk_pages = argc > 3 ? (size_t)atoi(argv[2]) * 256 : 0;
    size_t ring_pages = argc > 3 ? (size_t)atoi(argv[3]) * 256 : 0;
    unsigned long ios = 0;
    uint64_t *ring, *out, said = 0;
    size_t at = 0;
    int fd;

    if (disk_pages < MAX_PAGES || ring_pages < MAX_PAGES) {
        errx(1, "usage: diskcheck DEVICE DISK_MB RING_MB");
    }
    fd = open(argv[1], O_RDWR | O_DIRECT);
    if (fd < 0) {
        err(1, "open %s", argv[1]);
    }
    versions = calloc(disk_pages, sizeof(*versions));
    ring = get_memory(ring_pages * PAGE);
    out = get_memory(MAX_PAGES * PAGE);
    for (size_t page = 0; page < disk_pages; page += MAX_PAGES) {
        disk_write(fd, out, page, MAX_PAGES);
    }
    for (;;) {
        size_t pages = 1u << (random_next() % 5);
        size_t page = random_next() % (disk_pages - pages + 1);

        if (at + pages > ring_pages) {
            at = 0;
        }
        disk_read(fd, ring + at * WORDS, page, pages);
        at += pages;
        if (ios % 4 == 0) {
            disk_write(fd, out, page, pages);
            ios++;
        }
        ios++;
        if (now_ns() - said > 100000000) {
            said = now_ns();
            say("disk %s ios=%lu ok", argv[1], ios);
        }
    }
}

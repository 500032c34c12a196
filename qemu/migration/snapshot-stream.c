/*
 * The RAM of a background snapshot as sections of a stream
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/timer.h"
#include "exec/target_page.h"
#include "qemu-file.h"
#include "ram.h"
#include "snapshot-blocks.h"
#include "snapshot-stream.h"

/* When to end a section, in which QEMU's migration figures stand still */
#define SECTION_MS 50

typedef struct SnapshotStream {
    QEMUFile *f;
    /* The block that the section has named last */
    SnapshotOwner *owner;
    /* To be told to ram_snapshot_saved() */
    uint64_t data_pages;
    uint64_t zero_pages;
    uint64_t bytes;
} SnapshotStream;

/* Returns the number of bytes written */
static size_t write_header(SnapshotStream *s, SnapshotOwner *owner,
                           uint64_t offset, uint64_t flags)
{
    size_t len = strlen(owner->idstr);

    if (owner == s->owner) {
        qemu_put_be64(s->f, offset | flags | RAM_SAVE_FLAG_CONTINUE);
        return 8;
    }
    s->owner = owner;
    qemu_put_be64(s->f, offset | flags);
    qemu_put_byte(s->f, len);
    qemu_put_buffer(s->f, (uint8_t *)owner->idstr, len);
    return 8 + 1 + len;
}

/* Its data must stay until the next qemu_fflush() */
static void write_data(SnapshotStream *s, const SnapshotPage *page)
{
    size_t page_size = qemu_target_page_size();
    size_t len = write_header(s, page->owner, page->offset,
                              RAM_SAVE_FLAG_PAGE);

    qemu_put_buffer_async(s->f, page->data, page_size, false);
    s->data_pages++;
    s->bytes += len + page_size;
}

static void write_zeroes(SnapshotStream *s, const SnapshotPage *page)
{
    /* All but the first, which may name the block, are alike and short */
    struct QEMU_PACKED {
        uint64_t header;
        uint8_t value;
    } records[256] = {};
    uint64_t flags = RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE;
    uint64_t page_size = qemu_target_page_size();
    uint64_t done = 1;
    size_t len, i;

    len = write_header(s, page->owner, page->offset, RAM_SAVE_FLAG_ZERO);
    qemu_put_byte(s->f, 0);
    while (done < page->num_pages) {
        size_t n = MIN(page->num_pages - done, ARRAY_SIZE(records));

        for (i = 0; i < n; i++, done++) {
            records[i].header =
                cpu_to_be64((page->offset + done * page_size) | flags);
        }
        qemu_put_buffer(s->f, (uint8_t *)records, n * sizeof(records[0]));
    }
    s->zero_pages += page->num_pages;
    s->bytes += len + 1 + (page->num_pages - 1) * sizeof(records[0]);
}

int snapshot_stream_save(SnapshotRAM *ram, QEMUFile *f)
{
    int64_t end = qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + SECTION_MS;
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    SnapshotStream s = { .f = f };
    size_t i, n;
    int ret;

    do {
        n = snapshot_ram_next(ram, pages);
        for (i = 0; i < n; i++) {
            if (pages[i].data) {
                write_data(&s, &pages[i]);
            } else {
                write_zeroes(&s, &pages[i]);
            }
        }
        ret = qemu_fflush(f);
        snapshot_ram_written(ram, pages, n);
        ram_snapshot_saved(s.data_pages, s.zero_pages, s.bytes);
        s.data_pages = s.zero_pages = s.bytes = 0;
    } while (n && ret == 0 && qemu_clock_get_ms(QEMU_CLOCK_REALTIME) < end);

    if (ret < 0) {
        return ret;
    }
    if (snapshot_ram_failure(ram)) {
        return -EIO;
    }
    qemu_put_be64(f, RAM_SAVE_FLAG_EOS);
    ram_transferred_add(8);
    return qemu_fflush(f) ?: n == 0 && snapshot_ram_is_saved(ram);
}

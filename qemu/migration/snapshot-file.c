/*
 * The RAM of a background snapshot in places of a file
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bitmap.h"
#include "qemu/iov.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "exec/target_page.h"
#include "file.h"
#include "io/channel-file.h"
#include "migration-stats.h"
#include "migration.h"
#include "options.h"
#include "qemu-file.h"
#include "ram.h"
#include "snapshot-blocks.h"
#include "snapshot-file.h"

/* How often QEMU's migration figures are brought up to date */
#define FIGURES_MS 100

/* A thread that saves RAM and writes it */
typedef struct Writer {
    QIOChannel *ioc;
    QemuThread thread;
} Writer;

/* There is one snapshot at a time */
static struct {
    Writer *writers;
    size_t num;
    /* Whether the channels are the writers' own */
    bool own_channels;

    SnapshotRAM *ram;
    /* Posted by each writer when it ends */
    QemuSemaphore ended;

    QemuMutex lock;
    /* Why the first writer failed that did.  With the lock held. */
    Error *err;
} file;

/* Pages of a block that follow one another */
typedef struct Run {
    SnapshotOwner *owner;
    uint64_t offset;
    size_t size;
    struct iovec iov[SNAPSHOT_RAM_MAX_NEXT];
    unsigned int niov;
} Run;

/* Write all of a run at its place */
static bool write_run(Writer *w, Run *run, Error **errp)
{
    RAMBlock *block = run->owner->block;
    size_t page_size = qemu_target_page_size();
    uint64_t place = block->pages_offset + run->offset;
    struct iovec *iov = run->iov;
    unsigned int niov = run->niov;
    size_t left = run->size;

    while (left) {
        ssize_t ret = qio_channel_pwritev(w->ioc, iov, niov, place, errp);

        if (ret < 0) {
            return false;
        }
        iov_discard_front(&iov, &niov, ret);
        place += ret;
        left -= ret;
    }
    bitmap_set_atomic(block->file_bmap, run->offset / page_size,
                      run->size / page_size);
    return true;
}

/* Does a page follow the run?  Then it becomes part of it. */
static bool run_append(Run *run, const SnapshotPage *page)
{
    size_t page_size = qemu_target_page_size();
    struct iovec *last;

    if (!run->niov || page->owner != run->owner ||
        page->offset != run->offset + run->size) {
        return false;
    }
    last = &run->iov[run->niov - 1];
    if ((uint8_t *)last->iov_base + last->iov_len == page->data) {
        last->iov_len += page_size;
    } else {
        run->iov[run->niov++] = (struct iovec) { page->data, page_size };
    }
    run->size += page_size;
    return true;
}

static bool write_pages(Writer *w, const SnapshotPage *pages, size_t n,
                        Error **errp)
{
    size_t page_size = qemu_target_page_size();
    uint64_t data_pages = 0, zero_pages = 0;
    Run run = { .niov = 0 };
    size_t i;

    for (i = 0; i < n; i++) {
        if (!pages[i].data) {
            /* A hole of the file, and no bit in the bitmap */
            zero_pages += pages[i].num_pages;
            continue;
        }
        data_pages++;
        if (run_append(&run, &pages[i])) {
            continue;
        }
        if (run.niov && !write_run(w, &run, errp)) {
            return false;
        }
        run.owner = pages[i].owner;
        run.offset = pages[i].offset;
        run.size = page_size;
        run.iov[0] = (struct iovec) { pages[i].data, page_size };
        run.niov = 1;
    }
    if (run.niov && !write_run(w, &run, errp)) {
        return false;
    }
    stat64_add(file.own_channels ? &mig_stats.multifd_bytes
                                 : &mig_stats.qemu_file_transferred,
               data_pages * page_size);
    ram_snapshot_saved(data_pages, zero_pages, data_pages * page_size);
    return true;
}

static void *writer_thread(void *opaque)
{
    Writer *w = opaque;
    SnapshotPage pages[SNAPSHOT_RAM_MAX_NEXT];
    Error *err = NULL;
    bool ok = true;
    size_t n;

    while (ok && (n = snapshot_ram_next(file.ram, pages))) {
        ok = write_pages(w, pages, n, &err);
        snapshot_ram_written(file.ram, pages, n);
    }
    /* Some file systems tell only now that there is no room */
    if (ok && file.own_channels) {
        ok = qio_channel_close(w->ioc, &err) == 0;
    }
    if (!ok) {
        /* First of all */
        snapshot_ram_stop(file.ram);
        QEMU_LOCK_GUARD(&file.lock);
        error_propagate(&file.err, err);
    }
    qemu_sem_post(&file.ended);
    return NULL;
}

bool snapshot_file_setup(QEMUFile *f, Error **errp)
{
    size_t i;

    file.own_channels = migrate_multifd();
    file.num = file.own_channels ? migrate_multifd_channels() : 1;
    file.writers = g_new0(Writer, file.num);
    qemu_sem_init(&file.ended, 0);
    qemu_mutex_init(&file.lock);
    for (i = 0; i < file.num; i++) {
        Writer *w = &file.writers[i];

        if (!file.own_channels) {
            w->ioc = QIO_CHANNEL(object_ref(qemu_file_get_ioc(f)));
            continue;
        }
        w->ioc = (QIOChannel *)file_send_channel_open(errp);
        if (!w->ioc) {
            return false;
        }
    }
    return true;
}

void snapshot_file_cleanup(void)
{
    size_t i;

    if (!file.writers) {
        return;
    }
    for (i = 0; i < file.num && file.writers[i].ioc; i++) {
        object_unref(file.writers[i].ioc);
    }
    qemu_mutex_destroy(&file.lock);
    qemu_sem_destroy(&file.ended);
    g_clear_pointer(&file.writers, g_free);
    file_cleanup_outgoing_migration();
}

/* Write all RAM.  Returns false with @errp set, or if it was stopped. */
static bool write_ram(SnapshotRAM *ram, Error **errp)
{
    size_t i, running = file.num;

    file.ram = ram;
    for (i = 0; i < file.num; i++) {
        g_autofree char *name =
            g_strdup_printf(MIGRATION_THREAD_SNAPSHOT_WRITER, (int)i);

        qemu_thread_create(&file.writers[i].thread, name, writer_thread,
                           &file.writers[i], QEMU_THREAD_JOINABLE);
    }
    while (running) {
        if (qemu_sem_timedwait(&file.ended, FIGURES_MS) == 0) {
            running--;
        } else {
            migration_rate_limit();
        }
    }
    for (i = 0; i < file.num; i++) {
        qemu_thread_join(&file.writers[i].thread);
    }
    if (file.err) {
        error_propagate(errp, g_steal_pointer(&file.err));
        return false;
    }
    return snapshot_ram_is_saved(ram);
}

static void write_bitmap(void *owner, void *opaque)
{
    RAMBlock *block = ((SnapshotOwner *)owner)->block;
    size_t pages = block->used_length / qemu_target_page_size();
    size_t size = BITS_TO_LONGS(pages) * sizeof(unsigned long);

    qemu_put_buffer_at(opaque, (uint8_t *)block->file_bmap, size,
                       block->bitmap_offset);
    ram_transferred_add(size);
}

int snapshot_file_save(SnapshotRAM *ram, QEMUFile *f)
{
    Error *err = NULL;

    if (!write_ram(ram, &err)) {
        if (err) {
            qemu_file_set_error_obj(f, -EIO, err);
        }
        return -EIO;
    }
    snapshot_ram_for_each_owner(ram, write_bitmap, f);
    qemu_put_be64(f, RAM_SAVE_FLAG_EOS);
    ram_transferred_add(8);
    return qemu_fflush(f) ?: 1;
}

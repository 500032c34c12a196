/*
 * Background snapshot: its figures for users
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "exec/target_page.h"
#include "monitor/monitor.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-events-migration.h"
#include "qapi/qapi-visit-migration.h"
#include "qapi/util.h"
#include "system/runstate.h"
#include "snapshot-figures.h"

static BackgroundSnapshotFreeze freeze_info(const SnapshotFigures *figures)
{
    const int64_t *us = figures->freeze_us;

    return (BackgroundSnapshotFreeze) {
        .total = us[SNAPSHOT_FREEZE_RESUME] - us[SNAPSHOT_FREEZE_BEGIN],
        .stop = us[SNAPSHOT_FREEZE_STOP] - us[SNAPSHOT_FREEZE_BEGIN],
        .pause = us[SNAPSHOT_FREEZE_PAUSE] - us[SNAPSHOT_FREEZE_STOP],
        .devices = us[SNAPSHOT_FREEZE_DEVICES] - us[SNAPSHOT_FREEZE_PAUSE],
        .arm = us[SNAPSHOT_FREEZE_ARM] - us[SNAPSHOT_FREEZE_DEVICES],
        .resume = us[SNAPSHOT_FREEZE_RESUME] - us[SNAPSHOT_FREEZE_ARM],
    };
}

void snapshot_figures_taken(const SnapshotFigures *figures)
{
    BackgroundSnapshotFreeze freeze = freeze_info(figures);

    qapi_event_send_background_snapshot_taken(&freeze, runstate_is_running());
}

static BackgroundSnapshotStalls *stalls_info(const SnapshotRAMStats *ram)
{
    BackgroundSnapshotStalls *info = g_new0(BackgroundSnapshotStalls, 1);
    uint64List **tail = &info->histogram;
    size_t i, num = 0;

    info->waiting = ram->waiting;
    info->total = ram->stall_ns / SCALE_US;
    info->longest = ram->longest_stall_ns / SCALE_US;
    for (i = 0; i < SNAPSHOT_RAM_STALL_LENGTHS; i++) {
        info->count += ram->stalls[i];
        num = ram->stalls[i] ? i + 1 : num;
    }
    for (i = 0; i < num; i++) {
        QAPI_LIST_APPEND(tail, ram->stalls[i]);
    }
    return info;
}

static BackgroundSnapshotBuffer *buffer_info(const SnapshotFigures *figures)
{
    BackgroundSnapshotBuffer *info = g_new0(BackgroundSnapshotBuffer, 1);
    size_t page_size = qemu_target_page_size();

    info->size = figures->buffer_size;
    info->used = figures->ram.buffer_used * page_size;
    info->peak = figures->ram.buffer_peak * page_size;
    info->waits = figures->ram.waits;
    return info;
}

BackgroundSnapshotInfo *snapshot_figures_info(void)
{
    const SnapshotFigures *figures = background_snapshot_figures();
    BackgroundSnapshotInfo *info;

    if (!figures) {
        return NULL;
    }
    info = g_new0(BackgroundSnapshotInfo, 1);
    info->write_trap = qapi_enum_parse(&SnapshotWriteTrap_lookup,
                                       figures->trap->name, -1, &error_abort);
    info->passed_over = QAPI_CLONE(SnapshotWriteTrapInfoList,
                                   figures->passed_over);
    if (figures->freeze_us[SNAPSHOT_FREEZE_RESUME]) {
        BackgroundSnapshotFreeze freeze = freeze_info(figures);

        info->freeze = QAPI_CLONE(BackgroundSnapshotFreeze, &freeze);
    }
    info->let_through_writes = figures->ram.let_through;
    info->trapped_writes = figures->ram.faults;
    info->stalls = stalls_info(&figures->ram);
    info->write_pages = figures->ram.fault_pages;
    info->scanned_pages = figures->ram.scan_pages;
    info->zero_pages = figures->ram.zero_pages;
    info->untouched_pages = figures->ram.untouched_pages;
    info->buffer = buffer_info(figures);
    info->split_huge_pages = figures->ram.huge_split;
    info->mended_huge_pages = figures->ram.huge_mended;
    return info;
}

static void print_stalls(Monitor *mon, const BackgroundSnapshotStalls *stalls)
{
    uint64List *number = stalls->histogram;
    uint64_t less_us;

    monitor_printf(mon, "guest writes that waited: %" PRIu64 ", %" PRIu64
                   " us in all, %" PRIu64 " us the longest; %" PRIu64
                   " wait now\n", stalls->count, stalls->total,
                   stalls->longest, stalls->waiting);
    for (less_us = 1; number; number = number->next, less_us *= 2) {
        if (number->value) {
            monitor_printf(mon, "  less than %" PRIu64 " us: %" PRIu64 "\n",
                           less_us, number->value);
        }
    }
}

void snapshot_figures_print(Monitor *mon, const BackgroundSnapshotInfo *info)
{
    const BackgroundSnapshotFreeze *freeze = info->freeze;
    const BackgroundSnapshotBuffer *buffer = info->buffer;
    SnapshotWriteTrapInfoList *trap;

    monitor_printf(mon, "write trap: %s\n",
                   SnapshotWriteTrap_str(info->write_trap));
    for (trap = info->passed_over; trap; trap = trap->next) {
        monitor_printf(mon, "  not %s: %s\n",
                       SnapshotWriteTrap_str(trap->value->trap),
                       trap->value->reason);
    }
    if (freeze) {
        monitor_printf(mon, "freeze: %" PRIu64 " us (stop %" PRIu64
                       ", pause %" PRIu64 ", devices %" PRIu64 ", arm %" PRIu64
                       ", resume %" PRIu64 ")\n", freeze->total, freeze->stop,
                       freeze->pause, freeze->devices, freeze->arm,
                       freeze->resume);
    }
    monitor_printf(mon, "guest writes that were stopped: %" PRIu64 ", and %"
                   PRIu64 " before the VM stood still\n", info->trapped_writes,
                   info->let_through_writes);
    print_stalls(mon, info->stalls);
    monitor_printf(mon, "saved pages: %" PRIu64 " scanned, %" PRIu64
                   " for guest writes; %" PRIu64 " of them zero, %" PRIu64
                   " untouched\n", info->scanned_pages, info->write_pages,
                   info->zero_pages, info->untouched_pages);
    monitor_printf(mon, "page buffer: %" PRIu64 " MiB, %" PRIu64
                   " KiB in use, at most %" PRIu64 " KiB; %" PRIu64
                   " times somebody waited for room\n", buffer->size / MiB,
                   buffer->used / KiB, buffer->peak / KiB, buffer->waits);
    monitor_printf(mon, "huge pages: %" PRIu64 " split, %" PRIu64
                   " of them huge again\n", info->split_huge_pages,
                   info->mended_huge_pages);
}

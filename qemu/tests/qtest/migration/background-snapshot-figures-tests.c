/*
 * QTest testcases for what query-migrate tells of background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"

static void check_freeze(QDict *freeze)
{
    g_assert_cmpint(qdict_get_int(freeze, "total"), >, 0);
    g_assert_cmpint(qdict_get_int(freeze, "stop") +
                    qdict_get_int(freeze, "pause") +
                    qdict_get_int(freeze, "devices") +
                    qdict_get_int(freeze, "arm") +
                    qdict_get_int(freeze, "resume"), ==,
                    qdict_get_int(freeze, "total"));
}

/* Figures that agree with one another, whenever they are asked for */
static void check_figures(QDict *figures)
{
    QDict *stalls = qdict_get_qdict(figures, "stalls");
    QDict *buffer = qdict_get_qdict(figures, "buffer");
    int64_t count = 0, most_us = 0, less_us = 1;
    const QListEntry *entry;

    check_freeze(qdict_get_qdict(figures, "freeze"));
    QLIST_FOREACH_ENTRY(qdict_get_qlist(stalls, "histogram"), entry) {
        int64_t n;

        g_assert_true(qnum_get_try_int(
            qobject_to(QNum, qlist_entry_obj(entry)), &n));
        count += n;
        most_us += n * less_us;
        less_us *= 2;
    }
    g_assert_cmpint(count, ==, qdict_get_int(stalls, "count"));
    g_assert_cmpint(qdict_get_int(stalls, "total"), <=, most_us);
    g_assert_cmpint(qdict_get_int(stalls, "longest"), <, less_us);
    g_assert_cmpint(qdict_get_int(stalls, "longest"), <=,
                    qdict_get_int(stalls, "total"));
    g_assert_cmpint(count, <=, qdict_get_int(figures, "trapped-writes"));

    g_assert_cmpint(qdict_get_int(buffer, "used"), <=,
                    qdict_get_int(buffer, "peak"));
    g_assert_cmpint(qdict_get_int(buffer, "peak"), <=,
                    qdict_get_int(buffer, "size"));
    g_assert_cmpint(qdict_get_int(figures, "untouched-pages"), <=,
                    qdict_get_int(figures, "zero-pages"));
    g_assert_cmpint(qdict_get_int(figures, "mended-huge-pages"), <=,
                    qdict_get_int(figures, "split-huge-pages"));
}

/* Pages that were saved, for whatever reason */
static int64_t saved(QDict *figures)
{
    return qdict_get_int(figures, "write-pages") +
           qdict_get_int(figures, "scanned-pages");
}

/* The freeze, the guest's writes and the buffer, while it is held and after */
static void test_running(void)
{
    QTestState *from, *to;
    g_autofree char *trap = NULL, *first = NULL;
    QDict *event, *rsp, *figures, *ram;
    g_auto(GStrv) traps = NULL;
    size_t passed_over;
    int64_t total_us;
    uint8_t byte;
    int sink;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER);
    sink = snapshot_open_sink(from, false);
    /* Zeroes would take next to no room */
    do {
        snapshot_wait_for_sweeps(from, 1);
        byte = snapshot_last_byte(from);
    } while (byte < 2 || byte > 200);
    snapshot_begin(from, "fd:sink");
    event = qtest_qmp_eventwait_ref(from, "BACKGROUND_SNAPSHOT_TAKEN");
    g_assert_true(qdict_get_bool(qdict_get_qdict(event, "data"), "running"));
    figures = qdict_get_qdict(qdict_get_qdict(event, "data"), "freeze");
    check_freeze(figures);
    total_us = qdict_get_int(figures, "total");
    qobject_unref(event);

    snapshot_wait_for_sweeps(from, 2);
    figures = snapshot_query_figures(from, &rsp);
    check_figures(figures);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "freeze"), "total"),
                    ==, total_us);
    g_assert_cmpint(qdict_get_int(figures, "trapped-writes"), >, 0);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "stalls"), "count"),
                    >, 0);
    /* The guest has written to all of its 100 MiB since */
    g_assert_cmpint(saved(figures) * TEST_MEM_PAGE_SIZE, >=,
                    end_address - start_address);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "buffer"), "size"),
                    ==, SNAPSHOT_LARGE_BUFFER);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "buffer"), "used"),
                    >, (end_address - start_address) / 2);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(rsp, "ram"), "remaining"), >,
                    0);
    trap = g_strdup(qdict_get_str(figures, "write-trap"));
    passed_over = qlist_size(qdict_get_qlist(figures, "passed-over"));
    qobject_unref(rsp);

    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    figures = snapshot_query_figures(from, &rsp);
    check_figures(figures);
    ram = qdict_get_qdict(rsp, "ram");
    g_assert_cmpstr(qdict_get_str(figures, "write-trap"), ==, trap);
    g_assert_cmpint(saved(figures), ==,
                    qdict_get_int(ram, "normal") +
                    qdict_get_int(ram, "duplicate"));
    g_assert_cmpint(qdict_get_int(figures, "zero-pages"), ==,
                    qdict_get_int(ram, "duplicate"));
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "buffer"), "used"),
                    ==, 0);
    qobject_unref(rsp);

    /* Nothing was forced: what would have been better is not possible */
    first = snapshot_first_trap(from);
    g_assert_cmpstr(trap, ==, first);
    traps = snapshot_list_traps(from);
    g_assert_cmpstr(trap, ==, traps[passed_over]);
    snapshot_restore_and_finish(from, to);
}

/* A buffer that is too small shows in waits and in how long they were */
static void test_waits(void)
{
    QTestState *from, *to;
    QDict *rsp, *figures;
    int64_t waiting;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_SMALL_BUFFER, false);
    if (sink < 0) {
        return;
    }
    do {
        figures = snapshot_query_figures(from, &rsp);
        waiting = qdict_get_int(qdict_get_qdict(figures, "stalls"), "waiting");
        qobject_unref(rsp);
    } while (!waiting);
    g_usleep(200 * 1000);
    snapshot_read_sink(sink, 500);
    wait_for_migration_complete(from);
    figures = snapshot_query_figures(from, &rsp);
    check_figures(figures);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "stalls"),
                                  "waiting"), ==, 0);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "buffer"), "waits"),
                    >, 0);
    /* It waited for the first byte to be read */
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "stalls"),
                                  "longest"), >, 100 * 1000);
    qobject_unref(rsp);
    snapshot_restore_and_finish(from, to);
}

/* They are there after a cancel as well, and gone with the next migration */
static void test_forgotten(void)
{
    QTestState *from, *to;
    g_autofree char *text = NULL;
    QDict *rsp, *figures;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_LARGE_BUFFER, false);
    if (sink < 0) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);
    migrate_cancel(from);
    wait_for_migration_status(from, "cancelled", NULL);
    close(sink);
    figures = snapshot_query_figures(from, &rsp);
    check_figures(figures);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(figures, "buffer"), "used"),
                    ==, 0);
    qobject_unref(rsp);

    text = qtest_hmp(from, "info migrate");
    g_assert_nonnull(strstr(text, "write trap: "));
    g_assert_nonnull(strstr(text, "freeze: "));
    g_assert_nonnull(strstr(text, "guest writes that were stopped: "));
    g_assert_nonnull(strstr(text, "guest writes that waited: "));
    g_assert_nonnull(strstr(text, "page buffer: 128 MiB"));

    /* One that is refused changes nothing */
    migrate_set_parameter_str(from, "mode", "cpr-reboot");
    snapshot_assert_migrate_fails(from, "background snapshot");
    migrate_set_parameter_str(from, "mode", "normal");
    check_figures(snapshot_query_figures(from, &rsp));
    qobject_unref(rsp);

    migrate_set_capability(from, "background-snapshot", false);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    g_assert_null(snapshot_query_figures(from, &rsp));
    qobject_unref(rsp);
    g_free(text);
    text = qtest_hmp(from, "info migrate");
    g_assert_null(strstr(text, "write trap"));
    migrate_end(from, to, false);
}

void migration_test_add_background_snapshot_figures(void)
{
    migration_test_add("/migration/background-snapshot/figures/running",
                       test_running);
    migration_test_add("/migration/background-snapshot/figures/waits",
                       test_waits);
    migration_test_add("/migration/background-snapshot/figures/forgotten",
                       test_forgotten);
}

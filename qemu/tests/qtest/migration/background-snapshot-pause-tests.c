/*
 * QTest testcases for background snapshots that pause for the user
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * With pause-before-switchover, RAM is looked at while the VM runs, and the VM
 * stands still until migrate-continue: the moment to snapshot its disks.
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"

#define PAUSE_MS 50

static bool is_running(QTestState *who)
{
    QDict *rsp = qtest_qmp_assert_success_ref(
        who, "{ 'execute': 'query-status' }");
    bool running = qdict_get_bool(rsp, "running");

    qobject_unref(rsp);
    return running;
}

/* Start a snapshot, and wait until the VM stands still for the user */
static void begin(QTestState *from, QTestState *to)
{
    const char *ungoals[] = { "completed", "failed", "cancelled", NULL };

    migrate_set_capability(from, "pause-before-switchover", true);
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_status(from, "pre-switchover", ungoals);
    g_assert_false(is_running(from));
}

static void end(QTestState *from, QTestState *to)
{
    QDict *rsp, *figures;

    g_usleep(PAUSE_MS * 1000);
    g_assert_false(is_running(from));
    migrate_continue(from, "pre-switchover");
    wait_for_migration_complete(from);
    g_assert_true(is_running(from));
    figures = qdict_get_qdict(snapshot_query_figures(from, &rsp), "freeze");
    g_assert_cmpint(qdict_get_int(figures, "pause"), >=, PAUSE_MS * 1000);
    g_assert_cmpint(qdict_get_int(figures, "pause"), <,
                    qdict_get_int(figures, "total"));
    qobject_unref(rsp);
    snapshot_restore_and_finish(from, to);
}

static void test_continue(void)
{
    QTestState *from, *to;

    if (snapshot_start_running(&from, &to)) {
        begin(from, to);
        end(from, to);
    }
}

/* A VM that the user had paused before */
static void test_paused(void)
{
    QTestState *from, *to;

    if (snapshot_start_running(&from, &to)) {
        qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
        begin(from, to);
        end(from, to);
    }
}

/* The VM runs, and the next snapshot succeeds, without pausing */
static void retry(QTestState *from, QTestState *to)
{
    g_assert_true(is_running(from));
    snapshot_wait_for_sweeps(from, 1);
    migrate_set_capability(from, "pause-before-switchover", false);
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void test_cancel(void)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    QTestState *from, *to;

    if (snapshot_start_running(&from, &to)) {
        begin(from, to);
        migrate_cancel(from);
        wait_for_migration_status(from, "cancelled", ungoals);
        retry(from, to);
    }
}

/* The moment has passed: the image would not fit the disks */
static void test_resumed(void)
{
    const char *ungoals[] = { "completed", "cancelled", NULL };
    QTestState *from, *to;
    QDict *rsp;

    if (snapshot_start_running(&from, &to)) {
        begin(from, to);
        qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
        qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
        migrate_continue(from, "pre-switchover");
        wait_for_migration_status(from, "failed", ungoals);
        rsp = migrate_query(from);
        g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                                "resumed before migrate-continue"));
        qobject_unref(rsp);
        retry(from, to);
    }
}

/* Whoever resets a VM that stands still does not want it to stand still */
static void test_reset(void)
{
    QTestState *from, *to;

    if (snapshot_start_running(&from, &to)) {
        begin(from, to);
        qtest_qmp_assert_success(from, "{ 'execute': 'system_reset' }");
        qtest_qmp_eventwait(from, "RESET");
        migrate_continue(from, "pre-switchover");
        wait_for_migration_complete(from);
        g_assert_true(is_running(from));
        migrate_end(from, to, false);
    }
}

static void test_quit(void)
{
    QTestState *from, *to;

    if (snapshot_start_running(&from, &to)) {
        begin(from, to);
        migrate_end(from, to, false);
    }
}

void migration_test_add_background_snapshot_pause(void)
{
    migration_test_add("/migration/background-snapshot/pause/continue",
                       test_continue);
    migration_test_add("/migration/background-snapshot/pause/paused",
                       test_paused);
    migration_test_add("/migration/background-snapshot/pause/cancel",
                       test_cancel);
    migration_test_add("/migration/background-snapshot/pause/resumed",
                       test_resumed);
    migration_test_add("/migration/background-snapshot/pause/reset",
                       test_reset);
    migration_test_add("/migration/background-snapshot/pause/quit",
                       test_quit);
}

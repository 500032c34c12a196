/*
 * QTest testcases for background snapshots with mapped-ram
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * For what the guest does, and what the image must hold, see
 * background-snapshot-tests.c.
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"

static const char *tmpfs;

/* @channels: of multifd; 0: without */
static void choose_format(QTestState *who, int channels, bool direct)
{
    migrate_set_capability(who, "mapped-ram", true);
    migrate_set_capability(who, "multifd", channels > 0);
    if (channels) {
        migrate_set_parameter_int(who, "multifd-channels", channels);
    }
    migrate_set_parameter_bool(who, "direct-io", direct);
}

/*
 * Start a source that writes, and a snapshot of it that cannot end before its
 * bandwidth is raised
 *
 * Returns: false if the test is skipped
 */
static bool start_slow(QTestState **from, QTestState **to, int channels,
                       bool direct)
{
    if (!snapshot_start_running(from, to)) {
        return false;
    }
    choose_format(*from, channels, direct);
    choose_format(*to, channels, direct);
    snapshot_set_buffer_size(*from, SNAPSHOT_LARGE_BUFFER);
    migrate_set_parameter_int(*from, "max-bandwidth", 1);
    snapshot_begin(*from, snapshot_image_uri);
    return true;
}

/* What the guest writes meanwhile is not in the image */
static void moment_common(int channels, bool direct)
{
    QTestState *from, *to;

    if (direct && !probe_o_direct_support(tmpfs)) {
        g_test_skip("Filesystem does not support O_DIRECT");
        return;
    }
    if (!start_slow(&from, &to, channels, direct)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 3);
    snapshot_assert_active(from);
    migrate_set_parameter_int(from, "max-bandwidth", 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void test_moment(void)
{
    moment_common(0, false);
}

static void test_moment_multifd(void)
{
    moment_common(4, false);
}

static void test_moment_direct(void)
{
    moment_common(2, true);
}

/* The next one finds nothing left of it, whatever its format */
static void test_cancel(void)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    QTestState *from, *to;
    int channels;

    if (!start_slow(&from, &to, 3, false)) {
        return;
    }
    for (channels = 2; channels >= 0; channels--) {
        migrate_cancel(from);
        wait_for_migration_status(from, "cancelled", ungoals);
        snapshot_wait_for_sweeps(from, 1);
        choose_format(from, channels, false);
        choose_format(to, channels, false);
        snapshot_begin(from, snapshot_image_uri);
    }
    migrate_set_parameter_int(from, "max-bandwidth", 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* Several channels are for files that have places */
static void test_multifd_alone(void)
{
    QTestState *from, *to;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    snapshot_assert_error(qtest_qmp_assert_failure_ref(
        from, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': 'multifd', 'state': true } ] } }"),
        "needs mapped-ram");
    migrate_end(from, to, false);
}

/* Places in a file cannot be encrypted as a stream can */
static void test_tls(void)
{
    QTestState *from, *to;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    choose_format(from, 0, false);
    migrate_set_parameter_str(from, "tls-creds", "any");
    snapshot_assert_migrate_fails(from, "Cannot use TLS with mapped-ram");
    migrate_end(from, to, false);
}

void migration_test_add_background_snapshot_file(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    migration_test_add("/migration/background-snapshot/file/moment",
                       test_moment);
    migration_test_add("/migration/background-snapshot/file/moment-multifd",
                       test_moment_multifd);
    migration_test_add("/migration/background-snapshot/file/moment-direct",
                       test_moment_direct);
    migration_test_add("/migration/background-snapshot/file/cancel",
                       test_cancel);
    migration_test_add("/migration/background-snapshot/file/multifd-alone",
                       test_multifd_alone);
    migration_test_add("/migration/background-snapshot/file/tls", test_tls);
}

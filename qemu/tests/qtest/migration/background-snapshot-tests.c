/*
 * QTest testcases for background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * The guest adds one to the first byte of each page of its memory, in order,
 * over and over.  So at any one moment, all pages up to the guest's position
 * hold one value, and all pages behind it hold the value before that.
 * check_guests_ram() asserts it.  An image with pages of two moments fails if
 * the guest has swept over its memory at least once between them, since then
 * there is a step of more than one, or more than one step.  The tests see to
 * that: they let nothing be written to the destination before the guest has
 * swept over all of its memory several times.  A page that is torn by a write
 * at the very time of its copying is for the unit tests to find.
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"

/* The guest is faster than the destination, and has to wait for it */
static void test_moment_small_buffer(void)
{
    QTestState *from, *to;
    uint8_t byte;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_SMALL_BUFFER, false);
    if (sink < 0) {
        return;
    }

    /* There is no room for what the guest writes in one sweep */
    byte = snapshot_last_byte(from);
    g_usleep(500 * 1000);
    g_assert_cmpint((uint8_t)(snapshot_last_byte(from) - byte), <=, 1);

    snapshot_read_sink(sink, 500);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* With the default buffer, to a file, without any waiting: the usual thing */
static void test_repeated(void)
{
    QTestState *from, *to;
    int i;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    for (i = 0; i < 5; i++) {
        migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
        /* Who hears of the end can start the next one at once */
        migration_event_wait(from, "completed");
    }
    snapshot_restore_and_finish(from, to);
}

/*
 * A limit on the bandwidth holds for what nobody waits for: the guest writes
 * all its memory meanwhile.  And it can be lifted.
 */
static void test_bandwidth(void)
{
    QTestState *from, *to;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER);
    migrate_set_parameter_int(from, "max-bandwidth", 1);
    snapshot_begin(from, snapshot_image_uri);
    snapshot_wait_for_sweeps(from, 3);
    snapshot_assert_active(from);
    migrate_set_parameter_int(from, "max-bandwidth", 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* The first byte of each page */
static uint8_t *read_guest(QTestState *who)
{
    uint8_t *bytes = g_malloc((end_address - start_address) /
                              TEST_MEM_PAGE_SIZE);
    unsigned address;

    for (address = start_address; address < end_address;
         address += TEST_MEM_PAGE_SIZE) {
        bytes[(address - start_address) / TEST_MEM_PAGE_SIZE] =
            qtest_readb(who, address);
    }
    return bytes;
}

/* A VM that the user has paused for the snapshot is resumed by it */
static void test_paused(void)
{
    g_autofree uint8_t *before = NULL;
    g_autofree uint8_t *after = NULL;
    QTestState *from, *to;
    int sink;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    wait_for_stop(from, get_src());
    before = read_guest(from);

    sink = snapshot_open_sink(from, false);
    snapshot_begin(from, "fd:sink");
    snapshot_wait_for_status(from, "running");
    snapshot_wait_for_sweeps(from, 5);
    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);

    snapshot_restore(to, "paused");
    after = read_guest(to);
    g_assert_cmpmem(before, (end_address - start_address) / TEST_MEM_PAGE_SIZE,
                    after, (end_address - start_address) / TEST_MEM_PAGE_SIZE);
    snapshot_wait_for_status(from, "running");
    snapshot_finish(from, to);
}

/* Its image runs by itself as well */
static void test_paused_autostart(void)
{
    QTestState *from, *to;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    snapshot_begin(from, snapshot_image_uri);
    wait_for_migration_complete(from);
    snapshot_quit_source(from);

    migrate_incoming_qmp(to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(to);
    snapshot_wait_for_status(to, "running");
    snapshot_wait_for_sweeps(to, 1);
    migrate_end(from, to, true);
}

/* A VM that is stopped for another reason is left as it is */
static void test_prelaunch(void)
{
    QTestState *from, *to;

    if (!snapshot_start(&from, &to, "-S", "-S")) {
        return;
    }
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    migration_event_wait(from, "completed");
    snapshot_wait_for_status(from, "prelaunch");
    g_assert_false(get_src()->resume_seen);

    snapshot_restore(to, "prelaunch");
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    snapshot_finish(from, to);
}

/* The user pauses the VM during the snapshot, and has it paused at its end */
static void test_stop(void)
{
    QTestState *from, *to;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_LARGE_BUFFER, false);
    if (sink < 0) {
        return;
    }
    snapshot_wait_for_sweeps(from, 2);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    snapshot_wait_for_status(from, "paused");

    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    snapshot_wait_for_status(from, "paused");
    check_guests_ram(from);
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    snapshot_restore_and_finish(from, to);
}

static void test_stop_cont(void)
{
    QTestState *from, *to;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_LARGE_BUFFER, false);
    if (sink < 0) {
        return;
    }
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    snapshot_wait_for_status(from, "paused");
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    snapshot_wait_for_sweeps(from, 5);

    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void test_reset(void)
{
    QTestState *from, *to;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_LARGE_BUFFER, false);
    if (sink < 0) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);
    qtest_system_reset(from);
    /* It boots and writes anew */
    snapshot_wait_for_sweeps(from, 5);

    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void test_quit_common(bool is_pipe)
{
    QTestState *from, *to;
    int sink;

    /* The guest's writes wait, and so does the thread that writes the image */
    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_SMALL_BUFFER, is_pipe);
    if (sink < 0) {
        return;
    }
    /* Asserts that the exit status is good */
    snapshot_quit_source(from);
    migrate_end(from, to, false);
    close(sink);
}

static void test_quit_socket(void)
{
    test_quit_common(false);
}

static void test_quit_pipe(void)
{
    test_quit_common(true);
}

/* The destination at @uri takes nothing, not even the cancelling */
static void cancel_and_retry(QTestState *from, QTestState *to, const char *uri)
{
    const char *ungoals[] = { "completed", "failed", NULL };

    snapshot_set_buffer_size(from, SNAPSHOT_SMALL_BUFFER);
    snapshot_begin(from, uri);
    /* By then the guest's writes wait, and so does who writes the image */
    g_usleep(500 * 1000);
    migrate_cancel(from);
    snapshot_wait_for_sweeps(from, 5);
    wait_for_migration_status(from, "cancelled", ungoals);

    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void test_cancel_sink(bool is_pipe)
{
    QTestState *from, *to;
    int sink;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    sink = snapshot_open_sink(from, is_pipe);
    cancel_and_retry(from, to, "fd:sink");
    close(sink);
}

static void test_cancel_socket(void)
{
    test_cancel_sink(false);
}

static void test_cancel_pipe(void)
{
    test_cancel_sink(true);
}

static void test_cancel_command(void)
{
    QTestState *from, *to;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    cancel_and_retry(from, to, "exec:exec sleep 600");
}

/* Destinations that break: when they are opened, and somewhere in RAM */
static void test_fail(void)
{
    static const char *const uris[] = {
        "unix:/nonexistent/socket",
        "exec:head -c 100000 >/dev/null",
        "exec:head -c 20000000 >/dev/null",
        "exec:cat >/dev/null; exit 3",
    };
    g_autofree char *uri = g_strdup_printf("file:%s/image", snapshot_image);
    QTestState *from, *to;
    size_t i;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    migrate_qmp_fail(from, uri, NULL, "{}");
    for (i = 0; i < ARRAY_SIZE(uris); i++) {
        migrate_qmp(from, to, uris[i], NULL, "{}");
        /* Asserts that the VM runs */
        wait_for_migration_fail(from, true);
        snapshot_wait_for_sweeps(from, 2);
    }
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* A write waits for ten seconds, no longer; then the snapshot has failed */
static void test_stall(void)
{
    QTestState *from, *to;
    QDict *rsp;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_SMALL_BUFFER, false);
    if (sink < 0) {
        return;
    }
    snapshot_wait_for_sweeps(from, 2);
    close(sink);
    wait_for_migration_fail(from, true);
    rsp = migrate_query(from);
    g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                            "snapshot-buffer-size"));
    qobject_unref(rsp);

    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/*
 * A second one is refused while one is under way, and so is trying out traps.
 * The one goes on, with its trap, whatever is set for the next one.
 */
static void test_second(void)
{
    QTestState *from, *to;
    int sink;

    sink = snapshot_start_to_sink(&from, &to, SNAPSHOT_LARGE_BUFFER, false);
    if (sink < 0) {
        return;
    }
    snapshot_assert_migrate_fails(from, "migration process in progress");
    snapshot_assert_error(qtest_qmp_assert_failure_ref(
        from, "{ 'execute': 'query-snapshot-write-traps' }"),
        "migration is running");
    migrate_set_parameter_str(from, "snapshot-write-trap", "uffd-thread");
    snapshot_wait_for_sweeps(from, 5);
    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

void migration_test_add_background_snapshot(MigrationTestEnv *env)
{
    snapshot_set_up(env);

    migration_test_add("/migration/background-snapshot/moment-small-buffer",
                       test_moment_small_buffer);
    migration_test_add("/migration/background-snapshot/repeated",
                       test_repeated);
    migration_test_add("/migration/background-snapshot/bandwidth",
                       test_bandwidth);
    migration_test_add("/migration/background-snapshot/paused", test_paused);
    migration_test_add("/migration/background-snapshot/paused-autostart",
                       test_paused_autostart);
    migration_test_add("/migration/background-snapshot/prelaunch",
                       test_prelaunch);
    migration_test_add("/migration/background-snapshot/stop", test_stop);
    migration_test_add("/migration/background-snapshot/stop-cont",
                       test_stop_cont);
    migration_test_add("/migration/background-snapshot/reset", test_reset);
    migration_test_add("/migration/background-snapshot/quit-socket",
                       test_quit_socket);
    migration_test_add("/migration/background-snapshot/quit-pipe",
                       test_quit_pipe);
    migration_test_add("/migration/background-snapshot/cancel-socket",
                       test_cancel_socket);
    migration_test_add("/migration/background-snapshot/cancel-pipe",
                       test_cancel_pipe);
    migration_test_add("/migration/background-snapshot/cancel-command",
                       test_cancel_command);
    migration_test_add("/migration/background-snapshot/fail", test_fail);
    migration_test_add("/migration/background-snapshot/second", test_second);

    if (!env->full_set) {
        return;
    }

    migration_test_add("/migration/background-snapshot/stall", test_stall);
}

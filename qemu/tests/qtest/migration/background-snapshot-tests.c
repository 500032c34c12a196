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
 * swept over all of its memory several times.
 */
#include "qemu/osdep.h"
#include <sys/socket.h>
#include "libqtest.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

/* Page buffers for all that the guest writes to, and for next to nothing */
#define LARGE_BUFFER (128 * MiB)
#define SMALL_BUFFER (1 * MiB)

#define TIMEOUT_S 120

static char *image;
static char *image_uri;

static void set_buffer_size(QTestState *who, uint64_t size)
{
    migrate_set_parameter_int(who, "snapshot-buffer-size", size);
}

static void wait_for_status(QTestState *who, const char *goal)
{
    int64_t end = g_get_monotonic_time() + TIMEOUT_S * G_USEC_PER_SEC;
    bool found;

    do {
        QDict *rsp = qtest_qmp_assert_success_ref(
            who, "{ 'execute': 'query-status' }");

        found = g_str_equal(qdict_get_str(rsp, "status"), goal);
        if (!found && g_get_monotonic_time() > end) {
            g_error("VM is %s, not %s", qdict_get_str(rsp, "status"), goal);
        }
        qobject_unref(rsp);
    } while (!found);
}

static uint8_t last_byte(QTestState *who)
{
    return qtest_readb(who, end_address - TEST_MEM_PAGE_SIZE);
}

/* Wait until the guest has written to each of its pages, @n times at least */
static void wait_for_sweeps(QTestState *who, int n)
{
    int64_t end = g_get_monotonic_time() + TIMEOUT_S * G_USEC_PER_SEC;
    uint8_t byte = last_byte(who);
    int steps = 0;

    while (steps <= n) {
        if (last_byte(who) != byte) {
            byte = last_byte(who);
            steps++;
        }
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static bool start(QTestState **from, QTestState **to, const char *opts_source,
                  const char *opts_target)
{
    MigrateStart args = {
        .only_tcg = true,
        .hide_stderr = true,
        .opts_source = opts_source,
        .opts_target = opts_target,
    };

    if (!migration_get_env()->has_tcg) {
        g_test_skip("TCG is not in this build, and other accelerators have no "
                    "write trap");
        return false;
    }
    if (migrate_start(from, to, "defer", &args)) {
        return false;
    }
    migrate_set_capability(*from, "background-snapshot", true);
    return true;
}

/* Start a source that writes, and a target that stays paused when restored */
static bool start_running(QTestState **from, QTestState **to)
{
    if (!start(from, to, NULL, "-S")) {
        return false;
    }
    wait_for_sweeps(*from, 1);
    return true;
}

/*
 * Give the source a destination "fd:sink" that takes nothing but what the test
 * reads from it.  A socket can be shut down by QEMU, a pipe cannot.
 */
static int open_sink(QTestState *from, bool is_pipe)
{
    int fds[2];

    if (is_pipe) {
        g_assert_cmpint(pipe(fds), ==, 0);
    } else {
        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), ==, 0);
    }
    qtest_qmp_fds_assert_success(from, &fds[1], 1, "{ 'execute': 'getfd',"
                                 " 'arguments': { 'fdname': 'sink' }}");
    close(fds[1]);
    return fds[0];
}

/* Read the image from the sink, pausing after each 64 KiB */
static void read_sink(int sink, int pause_us)
{
    g_autofree char *buf = g_malloc(64 * KiB);
    int fd = open(image, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ssize_t n;

    g_assert_cmpint(fd, >=, 0);
    while ((n = read(sink, buf, 64 * KiB)) > 0) {
        g_assert_cmpint(qemu_write_full(fd, buf, n), ==, n);
        g_usleep(pause_us);
    }
    g_assert_cmpint(n, ==, 0);
    close(fd);
    close(sink);
}

/* Start a snapshot of a VM that is to run, and wait until it runs again */
static void begin(QTestState *from, const char *uri)
{
    get_src()->resume_seen = false;
    migrate_qmp(from, NULL, uri, NULL, "{}");
    wait_for_resume(from, get_src());
}

/* Restore the image, and check it before it runs on */
static void restore(QTestState *to, const char *status)
{
    migrate_incoming_qmp(to, image_uri, NULL, "{}");
    wait_for_migration_complete(to);
    wait_for_status(to, status);
    check_guests_ram(to);
}

/* Only one of them at a time may lock the disk */
static void quit_source(QTestState *from)
{
    qtest_qmp_assert_success(from, "{ 'execute': 'quit' }");
    qtest_wait_qemu(from);
}

/* Source and target run on */
static void finish(QTestState *from, QTestState *to)
{
    wait_for_sweeps(from, 2);
    quit_source(from);
    qtest_qmp_assert_success(to, "{ 'execute': 'cont' }");
    wait_for_sweeps(to, 1);
    migrate_end(from, to, true);
}

/* Likewise, with the image of a VM that was running */
static void restore_and_finish(QTestState *from, QTestState *to)
{
    restore(to, "paused");
    finish(from, to);
}

static void test_moment(void)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");

    /* No write waits for the destination, which has taken nothing yet */
    wait_for_sweeps(from, 5);
    read_sink(sink, 0);
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

/* The guest is faster than the destination, and has to wait for it */
static void test_moment_small_buffer(void)
{
    QTestState *from, *to;
    uint8_t byte;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, SMALL_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");

    /* There is no room for what the guest writes in one sweep */
    byte = last_byte(from);
    g_usleep(500 * 1000);
    g_assert_cmpint((uint8_t)(last_byte(from) - byte), <=, 1);

    read_sink(sink, 500);
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

/* With the default buffer, to a file, without any waiting: the usual thing */
static void test_repeated(void)
{
    QTestState *from, *to;
    int i;

    if (!start_running(&from, &to)) {
        return;
    }
    for (i = 0; i < 5; i++) {
        migrate_qmp(from, to, image_uri, NULL, "{}");
        /* Who hears of the end can start the next one at once */
        migration_event_wait(from, "completed");
    }
    restore_and_finish(from, to);
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

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    wait_for_stop(from, get_src());
    before = read_guest(from);

    sink = open_sink(from, false);
    begin(from, "fd:sink");
    wait_for_status(from, "running");
    wait_for_sweeps(from, 5);
    read_sink(sink, 0);
    wait_for_migration_complete(from);

    restore(to, "paused");
    after = read_guest(to);
    g_assert_cmpmem(before, (end_address - start_address) / TEST_MEM_PAGE_SIZE,
                    after, (end_address - start_address) / TEST_MEM_PAGE_SIZE);
    wait_for_status(from, "running");
    finish(from, to);
}

/* Its image runs by itself as well */
static void test_paused_autostart(void)
{
    QTestState *from, *to;

    if (!start(&from, &to, NULL, NULL)) {
        return;
    }
    wait_for_sweeps(from, 1);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    begin(from, image_uri);
    wait_for_migration_complete(from);
    quit_source(from);

    migrate_incoming_qmp(to, image_uri, NULL, "{}");
    wait_for_migration_complete(to);
    wait_for_status(to, "running");
    wait_for_sweeps(to, 1);
    migrate_end(from, to, true);
}

/* A VM that is stopped for another reason is left as it is */
static void test_prelaunch(void)
{
    QTestState *from, *to;

    if (!start(&from, &to, "-S", "-S")) {
        return;
    }
    migrate_qmp(from, to, image_uri, NULL, "{}");
    migration_event_wait(from, "completed");
    wait_for_status(from, "prelaunch");
    g_assert_false(get_src()->resume_seen);

    restore(to, "prelaunch");
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    finish(from, to);
}

/* The user pauses the VM during the snapshot, and has it paused at its end */
static void test_stop(void)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");
    wait_for_sweeps(from, 2);
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    wait_for_status(from, "paused");

    read_sink(sink, 0);
    wait_for_migration_complete(from);
    wait_for_status(from, "paused");
    check_guests_ram(from);
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    restore_and_finish(from, to);
}

static void test_stop_cont(void)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");
    qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    wait_for_status(from, "paused");
    qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    wait_for_sweeps(from, 5);

    read_sink(sink, 0);
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

static void test_reset(void)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");
    wait_for_sweeps(from, 1);
    qtest_system_reset(from);
    /* It boots and writes anew */
    wait_for_sweeps(from, 5);

    read_sink(sink, 0);
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

static void test_quit_common(bool is_pipe)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    /* The guest's writes wait, and so does the thread that writes the image */
    set_buffer_size(from, SMALL_BUFFER);
    sink = open_sink(from, is_pipe);
    begin(from, "fd:sink");
    /* Asserts that the exit status is good */
    quit_source(from);
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

    set_buffer_size(from, SMALL_BUFFER);
    begin(from, uri);
    migrate_cancel(from);
    wait_for_sweeps(from, 5);
    wait_for_migration_status(from, "cancelled", ungoals);

    migrate_qmp(from, to, image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

static void test_cancel_sink(bool is_pipe)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    sink = open_sink(from, is_pipe);
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

    if (!start_running(&from, &to)) {
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
    };
    g_autofree char *uri = g_strdup_printf("file:%s/image", image);
    QTestState *from, *to;
    size_t i;

    if (!start_running(&from, &to)) {
        return;
    }
    migrate_qmp_fail(from, uri, NULL, "{}");
    for (i = 0; i < ARRAY_SIZE(uris); i++) {
        migrate_qmp(from, to, uris[i], NULL, "{}");
        /* Asserts that the VM runs */
        wait_for_migration_fail(from, true);
        wait_for_sweeps(from, 2);
    }
    migrate_qmp(from, to, image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

/* A second one is refused while one is under way, which goes on */
static void test_second(void)
{
    QTestState *from, *to;
    int sink;

    if (!start_running(&from, &to)) {
        return;
    }
    set_buffer_size(from, LARGE_BUFFER);
    sink = open_sink(from, false);
    begin(from, "fd:sink");
    migrate_qmp_fail(from, image_uri, NULL, "{}");
    wait_for_sweeps(from, 5);
    read_sink(sink, 0);
    wait_for_migration_complete(from);
    restore_and_finish(from, to);
}

static void test_capabilities(void)
{
    static const char *const others[] = {
        "auto-converge", "mapped-ram", "multifd", "pause-before-switchover",
        "return-path", "validate-uuid", "xbzrle",
    };
    QTestState *from, *to;
    size_t i, j;

    if (!start(&from, &to, NULL, NULL)) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(others); i++) {
        const char *order[] = { "background-snapshot", others[i] };

        for (j = 0; j < 2; j++) {
            QDict *rsp;

            migrate_set_capability(from, "background-snapshot", false);
            migrate_set_capability(from, order[j], true);
            rsp = qtest_qmp_assert_failure_ref(
                from, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
                " 'capabilities': [ { 'capability': %s, 'state': true } ] } }",
                order[!j]);
            g_assert_nonnull(strstr(qdict_get_str(rsp, "desc"), others[i]));
            qobject_unref(rsp);
            migrate_set_capability(from, order[j], false);
        }
    }
    migrate_end(from, to, false);
}

static uint64_t get_buffer_size(QTestState *who)
{
    QDict *rsp = qtest_qmp_assert_success_ref(
        who, "{ 'execute': 'query-migrate-parameters' }");
    uint64_t size = qdict_get_int(rsp, "snapshot-buffer-size");

    qobject_unref(rsp);
    return size;
}

/* Returns the upper limit that the error tells */
static uint64_t set_bad_buffer_size(QTestState *who, uint64_t size)
{
    QDict *rsp = qtest_qmp_assert_failure_ref(
        who, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'snapshot-buffer-size': %" PRIu64 " } }", size);
    const char *desc = qdict_get_str(rsp, "desc");
    const char *to = strstr(desc, " to ");
    uint64_t max;

    g_assert_nonnull(strstr(desc, "snapshot-buffer-size"));
    g_assert_nonnull(strstr(desc, "1048576"));
    g_assert_nonnull(to);
    g_assert_cmpint(qemu_strtou64(to + strlen(" to "), &to, 10, &max), ==, 0);
    qobject_unref(rsp);
    return max;
}

static void test_buffer_size(void)
{
    g_autofree char *info = NULL;
    g_autofree char *error = NULL;
    QTestState *from, *to;
    uint64_t ram;

    /* Firmware and video RAM come on top of it */
    if (!start(&from, &to, "-m 1G", "-m 150M")) {
        return;
    }
    g_assert_cmpuint(get_buffer_size(to), ==, 64 * MiB);
    g_assert_cmpuint(get_buffer_size(from), >=, 128 * MiB);
    g_assert_cmpuint(get_buffer_size(from), <, 160 * MiB);

    set_bad_buffer_size(from, 0);
    set_bad_buffer_size(from, MiB - 1);
    ram = set_bad_buffer_size(from, TiB);
    g_assert_cmpuint(ram, >=, GiB);
    set_bad_buffer_size(from, ram + 1);
    /* Refused is refused */
    g_assert_cmpuint(get_buffer_size(from), ==, ram / 8);

    set_buffer_size(from, MiB);
    set_buffer_size(from, 10 * MiB + 1);
    set_buffer_size(from, ram);

    error = qtest_hmp(from, "migrate_set_parameter snapshot-buffer-size 2M");
    g_assert_cmpstr(error, ==, "");
    g_assert_cmpuint(get_buffer_size(from), ==, 2 * MiB);
    info = qtest_hmp(from, "info migrate_parameters");
    g_assert_nonnull(strstr(info, "snapshot-buffer-size: 2097152 bytes"));
    migrate_end(from, to, false);
}

void migration_test_add_background_snapshot(MigrationTestEnv *env)
{
    image = g_strdup_printf("%s/%s", env->tmpfs, FILE_TEST_FILENAME);
    image_uri = g_strdup_printf("file:%s", image);

    migration_test_add("/migration/background-snapshot/moment", test_moment);
    migration_test_add("/migration/background-snapshot/moment-small-buffer",
                       test_moment_small_buffer);
    migration_test_add("/migration/background-snapshot/repeated",
                       test_repeated);
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
    migration_test_add("/migration/background-snapshot/capabilities",
                       test_capabilities);
    migration_test_add("/migration/background-snapshot/buffer-size",
                       test_buffer_size);
}

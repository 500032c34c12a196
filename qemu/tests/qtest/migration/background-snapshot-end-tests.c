/*
 * QTest testcases for what a background snapshot's destination may do
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * However long it takes to take the image's first byte, or to be closed, and
 * whatever it makes of signals: the VM and its monitor go on, and cancelling
 * ends the snapshot.
 */
#include "qemu/osdep.h"
#include <poll.h>
#include <sys/socket.h>
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/cutils.h"
#include "qobject/qdict.h"

/* What the monitor may take to answer, however busy the host is */
#define ANSWER_S 5

/* How long the slow commands take, whose end nobody shall wait for */
#define COMMAND_S 12

#define TIMEOUT_MS (60 * 1000)

/* Returns: whether @from answers, with its snapshot being @status */
static bool answers_with_status(QTestState *from, const char *status)
{
    int64_t start = g_get_monotonic_time();
    g_autofree char *got = migrate_query_status(from);

    g_assert_cmpint(g_get_monotonic_time() - start, <,
                    ANSWER_S * G_USEC_PER_SEC);
    return g_str_equal(got, status);
}

/* A command that goes on after the image's end, and prints, holds nobody up */
static void test_close(void)
{
    g_autofree char *uri = g_strdup_printf("exec:cat >%s; sleep %d; echo end",
                                           snapshot_image, COMMAND_S);
    QTestState *from, *to;
    int64_t start;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    snapshot_begin(from, uri);
    start = g_get_monotonic_time();
    while (answers_with_status(from, "active")) {
        g_usleep(10 * 1000);
    }
    /* It is whole when the command says so */
    g_assert_cmpint(g_get_monotonic_time() - start, >,
                    COMMAND_S * G_USEC_PER_SEC / 2);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/*
 * Start a snapshot to a command, which has a pipe as its file descriptor 3.
 *
 * Returns: the pipe's other end, or -1 if the test is skipped
 */
static int start_command(QTestState **from, QTestState **to,
                         const char *command)
{
    g_autofree char *fifo = g_strdup_printf("%s.fifo", snapshot_image);
    g_autofree char *uri = g_strdup_printf("exec:exec 3>%s; %s", fifo,
                                           command);
    int fd;

    if (!snapshot_start_running(from, to)) {
        return -1;
    }
    snapshot_set_buffer_size(*from, SNAPSHOT_LARGE_BUFFER);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    /* Does not wait for who writes to it */
    fd = open(fifo, O_RDONLY | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    snapshot_begin(*from, uri);
    return fd;
}

/* Returns: what the command has written next, or 0 if all of it has ended */
static char read_command(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };
    char byte = 0;

    g_assert_cmpint(poll(&pfd, 1, TIMEOUT_MS), ==, 1);
    g_assert_cmpint(read(fd, &byte, 1), >=, 0);
    return byte;
}

/* The VM runs, and the next snapshot succeeds */
static void retry(QTestState *from, QTestState *to)
{
    snapshot_wait_for_sweeps(from, 2);
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

static void end_command(int fd)
{
    g_autofree char *fifo = g_strdup_printf("%s.fifo", snapshot_image);

    close(fd);
    unlink(fifo);
}

/* A command that has all of the image, but does not end */
static void test_cancel_close(void)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    QTestState *from, *to;
    int fd = start_command(&from, &to, "cat >/dev/null; trap '' TERM; "
                           "sleep 600 & printf x >&3; wait");

    if (fd < 0) {
        return;
    }
    g_assert_cmpint(read_command(fd), ==, 'x');
    g_assert_true(answers_with_status(from, "active"));
    migrate_cancel(from);
    wait_for_migration_status(from, "cancelled", ungoals);
    /* Nothing of it is left */
    g_assert_cmpint(read_command(fd), ==, 0);
    end_command(fd);
    retry(from, to);
}

/*
 * A command that takes a part of an image must not see its end, and say that it
 * is whole.  This one does not take the hint to end.
 */
static int start_deaf_command(QTestState **from, QTestState **to)
{
    g_autofree char *command = g_strdup_printf(
        "trap '' TERM; (sleep %d; cat) >/dev/null; printf x >&3", COMMAND_S);

    return start_command(from, to, command);
}

static void test_cancel_deaf(void)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    QTestState *from, *to;
    int fd = start_deaf_command(&from, &to);

    if (fd < 0) {
        return;
    }
    migrate_cancel(from);
    wait_for_migration_status(from, "cancelled", ungoals);
    g_assert_cmpint(read_command(fd), ==, 0);
    end_command(fd);
    retry(from, to);
}

static void test_yank_deaf(void)
{
    QTestState *from, *to;
    int fd = start_deaf_command(&from, &to);

    if (fd < 0) {
        return;
    }
    qtest_qmp_assert_success(from, "{ 'execute': 'yank', 'arguments': {"
                             " 'instances': [ { 'type': 'migration' } ] } }");
    wait_for_migration_fail(from, true);
    g_assert_cmpint(read_command(fd), ==, 0);
    end_command(fd);
    retry(from, to);
}

/* Like snapshot_open_sink(), but it is full: it does not even take a header */
static int open_full_sink(QTestState *from, bool is_pipe)
{
    char buf[4096] = { 0 };
    int fds[2];

    if (is_pipe) {
        g_assert_cmpint(pipe(fds), ==, 0);
    } else {
        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), ==, 0);
    }
    g_assert_true(g_unix_set_fd_nonblocking(fds[1], true, NULL));
    while (write(fds[1], buf, sizeof(buf)) > 0) {
        /* Fill it */
    }
    while (write(fds[1], buf, 1) > 0) {
        /* To the last byte */
    }
    g_assert_cmpint(errno, ==, EAGAIN);
    g_assert_true(g_unix_set_fd_nonblocking(fds[1], false, NULL));
    qtest_qmp_fds_assert_success(from, &fds[1], 1, "{ 'execute': 'getfd',"
                                 " 'arguments': { 'fdname': 'sink' }}");
    close(fds[1]);
    return fds[0];
}

/* Nothing has happened to the VM yet, and nothing will */
static void full_sink_common(bool is_pipe, bool paused)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    const char *status = paused ? "paused" : "running";
    QTestState *from, *to;
    int sink;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    if (paused) {
        qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
        wait_for_stop(from, get_src());
    }
    get_src()->stop_seen = get_src()->resume_seen = false;
    sink = open_full_sink(from, is_pipe);
    migrate_qmp(from, to, "fd:sink", NULL, "{}");
    g_usleep(500 * 1000);
    g_assert_true(answers_with_status(from, "setup"));
    snapshot_wait_for_status(from, status);
    if (!paused) {
        snapshot_wait_for_sweeps(from, 1);
    }

    migrate_cancel(from);
    wait_for_migration_status(from, "cancelled", ungoals);
    snapshot_wait_for_status(from, status);
    g_assert_false(get_src()->stop_seen);
    g_assert_false(get_src()->resume_seen);
    close(sink);

    if (paused) {
        qtest_qmp_assert_success(from, "{ 'execute': 'cont' }");
    }
    retry(from, to);
}

static void test_full_socket(void)
{
    full_sink_common(false, false);
}

static void test_full_pipe(void)
{
    full_sink_common(true, false);
}

static void test_full_paused(void)
{
    full_sink_common(true, true);
}

void migration_test_add_background_snapshot_ends(void)
{
    migration_test_add("/migration/background-snapshot/end/close",
                       test_close);
    migration_test_add("/migration/background-snapshot/end/cancel-close",
                       test_cancel_close);
    migration_test_add("/migration/background-snapshot/end/cancel-deaf",
                       test_cancel_deaf);
    migration_test_add("/migration/background-snapshot/end/yank-deaf",
                       test_yank_deaf);
    migration_test_add("/migration/background-snapshot/end/full-socket",
                       test_full_socket);
    migration_test_add("/migration/background-snapshot/end/full-pipe",
                       test_full_pipe);
    migration_test_add("/migration/background-snapshot/end/full-paused",
                       test_full_paused);
}

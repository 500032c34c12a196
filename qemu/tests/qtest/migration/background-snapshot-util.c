/*
 * Helpers for tests of background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/socket.h>
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

#define TIMEOUT_S 120

char *snapshot_image;
char *snapshot_image_uri;

uint8_t snapshot_last_byte(QTestState *who)
{
    return qtest_readb(who, end_address - TEST_MEM_PAGE_SIZE);
}

void snapshot_wait_for_sweeps(QTestState *who, int n)
{
    int64_t end = g_get_monotonic_time() + TIMEOUT_S * G_USEC_PER_SEC;
    uint8_t byte = snapshot_last_byte(who);
    int steps = 0;

    while (steps <= n) {
        if (snapshot_last_byte(who) != byte) {
            byte = snapshot_last_byte(who);
            steps++;
        }
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        /* Nested virtualization has no CPU to waste */
        g_usleep(1000);
    }
}

void snapshot_wait_for_status(QTestState *who, const char *goal)
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

bool snapshot_start(QTestState **from, QTestState **to, const char *opts_source,
                    const char *opts_target)
{
    MigrateStart args = {
        .accel = "tcg",
        .opts_source = opts_source,
        .opts_target = opts_target,
    };

    if (!snapshot_start_args(from, to, &args)) {
        return false;
    }
    migrate_set_capability(*from, "background-snapshot", true);
    return true;
}

bool snapshot_start_args(QTestState **from, QTestState **to,
                         MigrateStart *args)
{
    if (g_str_equal(args->accel, "tcg") && !migration_get_env()->has_tcg) {
        g_test_skip("TCG is not in this build");
        return false;
    }
    args->hide_stderr = true;
    return migrate_start(from, to, "defer", args) == 0;
}

bool snapshot_start_running(QTestState **from, QTestState **to)
{
    if (!snapshot_start(from, to, NULL, "-S")) {
        return false;
    }
    snapshot_wait_for_sweeps(*from, 1);
    return true;
}

void snapshot_set_buffer_size(QTestState *who, uint64_t size)
{
    migrate_set_parameter_int(who, "snapshot-buffer-size", size);
}

int snapshot_open_sink(QTestState *from, bool is_pipe)
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

void snapshot_begin(QTestState *from, const char *uri)
{
    get_src()->resume_seen = false;
    migrate_qmp(from, NULL, uri, NULL, "{}");
    wait_for_resume(from, get_src());
}

QDict *snapshot_query_figures(QTestState *who, QDict **rsp)
{
    *rsp = migrate_query(who);
    return qdict_get_qdict(*rsp, "background-snapshot");
}

int snapshot_start_to_sink(QTestState **from, QTestState **to,
                           uint64_t buffer_size, bool is_pipe)
{
    int sink;

    if (!snapshot_start_running(from, to)) {
        return -1;
    }
    snapshot_set_buffer_size(*from, buffer_size);
    sink = snapshot_open_sink(*from, is_pipe);
    snapshot_begin(*from, "fd:sink");
    return sink;
}

void snapshot_read_sink(int sink, int pause_us)
{
    g_autofree char *buf = g_malloc(64 * KiB);
    int fd = open(snapshot_image, O_WRONLY | O_CREAT | O_TRUNC, 0600);
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

void snapshot_assert_active(QTestState *from)
{
    g_autofree char *status = migrate_query_status(from);

    g_assert_cmpstr(status, ==, "active");
}

void snapshot_restore(QTestState *to, const char *status)
{
    migrate_incoming_qmp(to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(to);
    snapshot_wait_for_status(to, status);
    check_guests_ram(to);
}

void snapshot_quit_source(QTestState *from)
{
    qtest_qmp_assert_success(from, "{ 'execute': 'quit' }");
    qtest_wait_qemu(from);
}

void snapshot_finish(QTestState *from, QTestState *to)
{
    snapshot_wait_for_sweeps(from, 2);
    snapshot_quit_source(from);
    qtest_qmp_assert_success(to, "{ 'execute': 'cont' }");
    snapshot_wait_for_sweeps(to, 1);
    migrate_end(from, to, true);
}

void snapshot_restore_and_finish(QTestState *from, QTestState *to)
{
    snapshot_restore(to, "paused");
    snapshot_finish(from, to);
}

static QList *query_traps(QTestState *who)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'query-snapshot-write-traps' }");
    QList *traps = qdict_get_qlist(rsp, "return");

    g_assert_nonnull(traps);
    qobject_ref(traps);
    qobject_unref(rsp);
    return traps;
}

char **snapshot_list_traps(QTestState *who)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    QList *traps = query_traps(who);
    const QListEntry *entry;

    QLIST_FOREACH_ENTRY(traps, entry) {
        QDict *info = qobject_to(QDict, qlist_entry_obj(entry));

        g_ptr_array_add(names, g_strdup(qdict_get_str(info, "trap")));
    }
    qobject_unref(traps);
    g_assert_cmpuint(names->len, >, 0);
    g_ptr_array_add(names, NULL);
    return (char **)g_ptr_array_steal(names, NULL);
}

char *snapshot_trap_reason(QTestState *who, const char *trap)
{
    QList *traps = query_traps(who);
    const QListEntry *entry;
    char *reason = NULL;
    bool found = false;

    QLIST_FOREACH_ENTRY(traps, entry) {
        QDict *info = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_str_equal(qdict_get_str(info, "trap"), trap)) {
            found = true;
            reason = g_strdup(qdict_get_try_str(info, "reason"));
            g_assert(qdict_get_bool(info, "available") == !reason);
        }
    }
    g_assert(found);
    qobject_unref(traps);
    return reason;
}

char *snapshot_first_trap(QTestState *who)
{
    QList *traps = query_traps(who);
    const QListEntry *entry;
    char *first = NULL;

    QLIST_FOREACH_ENTRY(traps, entry) {
        QDict *info = qobject_to(QDict, qlist_entry_obj(entry));

        if (!first && qdict_get_bool(info, "available")) {
            first = g_strdup(qdict_get_str(info, "trap"));
        }
    }
    qobject_unref(traps);
    return first;
}

void snapshot_assert_error(QDict *error, const char *why)
{
    const char *desc = qdict_get_str(error, "desc");

    if (!strstr(desc, why)) {
        g_error("'%s' does not tell '%s'", desc, why);
    }
    qobject_unref(error);
}

void snapshot_assert_migrate_fails(QTestState *who, const char *why)
{
    snapshot_assert_error(qtest_qmp_assert_failure_ref(
        who, "{ 'execute': 'migrate', 'arguments': { 'uri': %s } }",
        snapshot_image_uri), why);
}

void snapshot_assert_capability_fails(QTestState *who, const char *why)
{
    snapshot_assert_error(qtest_qmp_assert_failure_ref(
        who, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': 'background-snapshot',"
        " 'state': true } ] } }"), why);
}

void snapshot_set_up(MigrationTestEnv *env)
{
    snapshot_image = g_strdup_printf("%s/%s", env->tmpfs, FILE_TEST_FILENAME);
    snapshot_image_uri = g_strdup_printf("file:%s", snapshot_image);
}

/*
 * QTest testcases for the parameters of background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

static void test_capabilities(void)
{
    static const char *const others[] = {
        "auto-converge", "dirty-bitmaps", "pause-before-switchover",
        "return-path", "validate-uuid", "x-ignore-shared", "xbzrle",
    };
    QTestState *from, *to;
    size_t i, j;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(others); i++) {
        const char *order[] = { "background-snapshot", others[i] };

        for (j = 0; j < 2; j++) {
            migrate_set_capability(from, "background-snapshot", false);
            migrate_set_capability(from, order[j], true);
            snapshot_assert_error(qtest_qmp_assert_failure_ref(
                from, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
                " 'capabilities': [ { 'capability': %s, 'state': true } ] } }",
                order[!j]), others[i]);
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

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    g_assert_cmpuint(get_buffer_size(from), ==, 64 * MiB);
    migrate_end(from, to, false);

    /* Firmware and video RAM come on top of it */
    if (!snapshot_start(&from, &to, "-m 1G", NULL)) {
        return;
    }
    g_assert_cmpuint(get_buffer_size(from), >=, 128 * MiB);
    g_assert_cmpuint(get_buffer_size(from), <, 160 * MiB);

    set_bad_buffer_size(from, 0);
    set_bad_buffer_size(from, MiB - 1);
    ram = set_bad_buffer_size(from, TiB);
    g_assert_cmpuint(ram, >=, GiB);
    set_bad_buffer_size(from, ram + 1);
    /* Refused is refused */
    g_assert_cmpuint(get_buffer_size(from), ==, ram / 8);

    snapshot_set_buffer_size(from, MiB);
    snapshot_set_buffer_size(from, 10 * MiB + 1);
    snapshot_set_buffer_size(from, ram);

    error = qtest_hmp(from, "migrate_set_parameter snapshot-buffer-size 2M");
    g_assert_cmpstr(error, ==, "");
    g_assert_cmpuint(get_buffer_size(from), ==, 2 * MiB);
    info = qtest_hmp(from, "info migrate_parameters");
    g_assert_nonnull(strstr(info, "snapshot-buffer-size: 2097152 bytes"));
    migrate_end(from, to, false);
}

/* However large the VM is, and whatever room the host gives it */
static void test_buffer_size_capped(void)
{
    QTestState *qts = qtest_init("-machine none -m 64G -object "
                                 "memory-backend-ram,id=ram,size=64G,"
                                 "reserve=off -machine memory-backend=ram");

    g_assert_cmpuint(get_buffer_size(qts), <=, 1 * GiB);
    qtest_quit(qts);
}

/* A VM without a guest, which need not even have RAM */
static void test_query_write_traps(void)
{
    QTestState *qts = qtest_init("-machine none");
    QDict *rsp = qtest_qmp(qts, "{ 'execute': 'query-snapshot-write-traps' }");
    g_autofree char *info = qtest_hmp(qts, "info snapshot_write_traps");
    g_auto(GStrv) lines = g_strsplit(info, "\r\n", -1);
    g_auto(GStrv) traps = snapshot_list_traps(qts);
    size_t num_traps = g_strv_length(traps);
    const QListEntry *entry;
    size_t i = 0;

    g_assert_cmpuint(g_strv_length(lines), ==, num_traps + 1);
    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *trap = qobject_to(QDict, qlist_entry_obj(entry));
        const char *reason = qdict_get_try_str(trap, "reason");
        g_autofree char *line = NULL;

        g_assert_cmpuint(i, <, num_traps);
        line = reason ?
            g_strdup_printf("%s: not available: %s", traps[i], reason) :
            g_strdup_printf("%s: available", traps[i]);
        g_assert_cmpstr(qdict_get_str(trap, "trap"), ==, traps[i]);
        g_assert_cmpstr(lines[i], ==, line);
        i++;
    }
    g_assert_cmpuint(i, ==, num_traps);
    qobject_unref(rsp);
    qtest_quit(qts);
}

void migration_test_add_background_snapshot_params(void)
{
    migration_test_add("/migration/background-snapshot/capabilities",
                       test_capabilities);
    migration_test_add("/migration/background-snapshot/buffer-size",
                       test_buffer_size);
    migration_test_add("/migration/background-snapshot/buffer-size-capped",
                       test_buffer_size_capped);
    migration_test_add("/migration/background-snapshot/query-write-traps",
                       test_query_write_traps);
}

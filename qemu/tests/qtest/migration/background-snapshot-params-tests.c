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
#include "qapi/qapi-types-migration.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

/*
 * What is said of background-snapshot together with each other capability:
 * a part of the refusal, or NULL if it works.  Some cannot be set by themselves
 * in such a VM either.
 */
static const struct {
    const char *refusal;
    bool alone;
} verdicts[MIGRATION_CAPABILITY__MAX] = {
    [MIGRATION_CAPABILITY_XBZRLE] = { "xbzrle", true },
    [MIGRATION_CAPABILITY_RDMA_PIN_ALL] = { "rdma-pin-all", true },
    [MIGRATION_CAPABILITY_AUTO_CONVERGE] = { "auto-converge", true },
    [MIGRATION_CAPABILITY_ZERO_BLOCKS] = { NULL, true },
    [MIGRATION_CAPABILITY_EVENTS] = { NULL, true },
    [MIGRATION_CAPABILITY_POSTCOPY_RAM] = { "postcopy-ram" },
    [MIGRATION_CAPABILITY_X_COLO] = { "" },
    [MIGRATION_CAPABILITY_RELEASE_RAM] = { "release-ram", true },
    [MIGRATION_CAPABILITY_RETURN_PATH] = { "return-path", true },
    [MIGRATION_CAPABILITY_PAUSE_BEFORE_SWITCHOVER] = { NULL, true },
    [MIGRATION_CAPABILITY_MULTIFD] = { "needs mapped-ram", true },
    [MIGRATION_CAPABILITY_DIRTY_BITMAPS] = { "dirty-bitmaps", true },
    [MIGRATION_CAPABILITY_POSTCOPY_BLOCKTIME] = { "postcopy-blocktime", true },
    [MIGRATION_CAPABILITY_LATE_BLOCK_ACTIVATE] = {
        "late-block-activate", true },
    [MIGRATION_CAPABILITY_X_IGNORE_SHARED] = { "x-ignore-shared", true },
    [MIGRATION_CAPABILITY_VALIDATE_UUID] = { "validate-uuid", true },
    [MIGRATION_CAPABILITY_BACKGROUND_SNAPSHOT] = { NULL, true },
    [MIGRATION_CAPABILITY_ZERO_COPY_SEND] = { "zero-copy-send" },
    [MIGRATION_CAPABILITY_POSTCOPY_PREEMPT] = { "" },
    [MIGRATION_CAPABILITY_SWITCHOVER_ACK] = { "" },
    [MIGRATION_CAPABILITY_DIRTY_LIMIT] = { "dirty-limit" },
    [MIGRATION_CAPABILITY_MAPPED_RAM] = { NULL, true },
};

#define SET_CAPABILITIES "{ 'execute': 'migrate-set-capabilities'," \
    " 'arguments': { 'capabilities': [ " \
    "{ 'capability': %s, 'state': true }, " \
    "{ 'capability': %s, 'state': true } ] } }"

static void test_capabilities(void)
{
    const char *ours = "background-snapshot";
    QTestState *from, *to;
    int cap;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    for (cap = 0; cap < MIGRATION_CAPABILITY__MAX; cap++) {
        const char *other = MigrationCapability_str(cap);
        const char *refusal = verdicts[cap].refusal;

        migrate_set_capability(from, ours, false);
        if (!refusal) {
            /* One that has no entry is a new one */
            g_assert_true(verdicts[cap].alone);
            qtest_qmp_assert_success(from, SET_CAPABILITIES, ours, other);
            if (cap == MIGRATION_CAPABILITY_MAPPED_RAM) {
                migrate_set_capability(from, other, false);
            }
            continue;
        }
        snapshot_assert_error(qtest_qmp_assert_failure_ref(
            from, SET_CAPABILITIES, ours, other), refusal);
        if (verdicts[cap].alone) {
            migrate_set_capability(from, other, true);
            snapshot_assert_capability_fails(from, refusal);
            migrate_set_capability(from, other, false);
        }
    }
    migrate_end(from, to, false);
}

static uint64_t get_parameter(QTestState *who, const char *name)
{
    QDict *rsp = qtest_qmp_assert_success_ref(
        who, "{ 'execute': 'query-migrate-parameters' }");
    uint64_t value = qdict_get_int(rsp, name);

    qobject_unref(rsp);
    return value;
}

static uint64_t get_buffer_size(QTestState *who)
{
    return get_parameter(who, "snapshot-buffer-size");
}

/* Which size QEMU would choose for a snapshot now; 0: it was told one */
static uint64_t get_chosen_size(QTestState *who)
{
    g_autofree char *info = qtest_hmp(who, "info migrate_parameters");
    const char *line = strstr(info, "snapshot-buffer-size: ");
    const char *end;
    uint64_t size;

    g_assert_nonnull(line);
    line += strlen("snapshot-buffer-size: ");
    g_assert_cmpint(qemu_strtou64(line, &end, 10, &size), ==, 0);
    return g_str_has_prefix(end, " bytes (chosen by QEMU)") ? size : 0;
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
    g_assert_cmpuint(get_buffer_size(from), ==, 0);
    g_assert_cmpuint(get_chosen_size(from), ==, 64 * MiB);
    migrate_end(from, to, false);

    /* Firmware and video RAM come on top of it */
    if (!snapshot_start(&from, &to, "-m 1G", NULL)) {
        return;
    }
    g_assert_cmpuint(get_chosen_size(from), >=, 128 * MiB);
    g_assert_cmpuint(get_chosen_size(from), <, 160 * MiB);

    set_bad_buffer_size(from, MiB - 1);
    ram = set_bad_buffer_size(from, TiB);
    g_assert_cmpuint(ram, >=, GiB);
    set_bad_buffer_size(from, ram + 1);
    /* Refused is refused */
    g_assert_cmpuint(get_buffer_size(from), ==, 0);
    g_assert_cmpuint(get_chosen_size(from), ==, ram / 8);

    snapshot_set_buffer_size(from, MiB);
    snapshot_set_buffer_size(from, 10 * MiB + 1);
    snapshot_set_buffer_size(from, ram);

    error = qtest_hmp(from, "migrate_set_parameter snapshot-buffer-size 2M");
    g_assert_cmpstr(error, ==, "");
    g_assert_cmpuint(get_buffer_size(from), ==, 2 * MiB);
    g_assert_cmpuint(get_chosen_size(from), ==, 0);
    info = qtest_hmp(from, "info migrate_parameters");
    g_assert_nonnull(strstr(info, "snapshot-buffer-size: 2097152 bytes\r\n"));

    /* As for whoever sets again what there was before */
    snapshot_set_buffer_size(from, 0);
    g_assert_cmpuint(get_chosen_size(from), ==, ram / 8);
    migrate_end(from, to, false);
}

/* However large the VM is, and whatever room the host gives it */
static void test_buffer_size_capped(void)
{
    QTestState *qts = qtest_init("-machine none -m 64G -object "
                                 "memory-backend-ram,id=ram,size=64G,"
                                 "reserve=off -machine memory-backend=ram");

    g_assert_cmpuint(get_chosen_size(qts), >=, 1 * MiB);
    g_assert_cmpuint(get_chosen_size(qts), <=, 1 * GiB);
    qtest_quit(qts);
}

static void test_stall_limits(void)
{
    static const struct {
        const char *name;
        uint64_t default_value, max;
        const char *unit;
    } limits[] = {
        { "snapshot-stall-limit", 10000, 3600 * 1000, "ms" },
        { "snapshot-stall-share", 0, 100, "%" },
    };
    QTestState *from, *to;
    QDict *rsp;
    size_t i;

    if (!snapshot_start(&from, &to, NULL, NULL)) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(limits); i++) {
        g_autofree char *line = g_strdup_printf("%s: 50 %s", limits[i].name,
                                                limits[i].unit);
        g_autofree char *error = NULL;
        g_autofree char *info = NULL;

        g_assert_cmpuint(get_parameter(from, limits[i].name), ==,
                         limits[i].default_value);
        migrate_set_parameter_int(from, limits[i].name, limits[i].max);
        migrate_set_parameter_int(from, limits[i].name, 0);
        snapshot_assert_error(qtest_qmp_assert_failure_ref(
            from, "{ 'execute': 'migrate-set-parameters',"
            " 'arguments': { %s: %" PRIu64 " } }", limits[i].name,
            limits[i].max + 1), limits[i].name);
        g_assert_cmpuint(get_parameter(from, limits[i].name), ==, 0);

        error = qtest_hmp(from, "migrate_set_parameter %s 50", limits[i].name);
        g_assert_cmpstr(error, ==, "");
        info = qtest_hmp(from, "info migrate_parameters");
        g_assert_nonnull(strstr(info, line));
    }
    migrate_end(from, to, false);

    /* Nobody reads the image, and the guest would have to wait for that */
    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    migrate_set_parameter_int(from, "snapshot-stall-limit", 200);
    snapshot_set_buffer_size(from, SNAPSHOT_SMALL_BUFFER);
    snapshot_begin(from, "exec:sleep 5; cat >/dev/null");
    snapshot_wait_for_sweeps(from, 2);
    wait_for_migration_fail(from, true);
    rsp = migrate_query(from);
    g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                            "snapshot-stall-limit"));
    qobject_unref(rsp);

    /* It goes on, and without the limit the next one succeeds */
    migrate_set_parameter_int(from, "snapshot-stall-limit", 0);
    snapshot_wait_for_sweeps(from, 1);
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* No wait is long, but there are many of them */
static void test_stall_share(void)
{
    QTestState *from, *to;
    QDict *rsp;
    int sink;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    migrate_set_parameter_int(from, "snapshot-stall-share", 50);
    snapshot_set_buffer_size(from, SNAPSHOT_SMALL_BUFFER);
    sink = snapshot_open_sink(from, false);
    snapshot_begin(from, "fd:sink");
    snapshot_read_sink(sink, 20 * 1000);
    wait_for_migration_fail(from, true);
    rsp = migrate_query(from);
    g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                            "snapshot-stall-share"));
    qobject_unref(rsp);

    snapshot_wait_for_sweeps(from, 1);
    migrate_set_parameter_int(from, "snapshot-stall-share", 0);
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

/* They are for migrations that send RAM again and again, or get answers */
static void test_meaningless(void)
{
    QTestState *from, *to;

    if (!snapshot_start_running(&from, &to)) {
        return;
    }
    qtest_qmp_assert_success(
        from, "{ 'execute': 'migrate-set-parameters', 'arguments': {"
        " 'announce-initial': 1, 'announce-max': 1, 'announce-rounds': 1,"
        " 'announce-step': 1, 'throttle-trigger-threshold': 1,"
        " 'cpu-throttle-initial': 99, 'cpu-throttle-increment': 99,"
        " 'cpu-throttle-tailslow': true, 'max-cpu-throttle': 99,"
        " 'avail-switchover-bandwidth': 1, 'downtime-limit': 0,"
        " 'x-checkpoint-delay': 1, 'xbzrle-cache-size': %" PRIu64 ","
        " 'max-postcopy-bandwidth': 1, 'multifd-compression': 'zlib',"
        " 'multifd-zlib-level': 9, 'multifd-zstd-level': 9,"
        " 'multifd-qatzip-level': 9, 'x-vcpu-dirty-limit-period': 1,"
        " 'vcpu-dirty-limit': 1, 'block-bitmap-mapping': [],"
        " 'direct-io': true } }", (uint64_t)MiB);
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER);
    snapshot_begin(from, snapshot_image_uri);
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
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
    migration_test_add("/migration/background-snapshot/stall-limits",
                       test_stall_limits);
    migration_test_add("/migration/background-snapshot/stall-share",
                       test_stall_share);
    migration_test_add("/migration/background-snapshot/meaningless",
                       test_meaningless);
    migration_test_add("/migration/background-snapshot/query-write-traps",
                       test_query_write_traps);
}

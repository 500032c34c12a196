/*
 * QTest testcases for background snapshots that are sent through TLS
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * The target takes the stream as it comes.  While it is stopped, it takes
 * nothing, and what is sent has to wait for the socket below TLS.
 */
#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <gnutls/gnutls.h>
#include "crypto/tlscredspsk.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qdict.h"
#include "tests/unit/crypto-tls-psk-helpers.h"

static const char *tmpfs;

typedef void WriteKey(const char *file);

/* The caller frees it */
static char *key_dir(const char *endpoint)
{
    return g_strdup_printf("%s/tls-%s", tmpfs, endpoint);
}

static void add_credentials(QTestState *who, const char *endpoint,
                            WriteKey *write_key)
{
    g_autofree char *dir = key_dir(endpoint);
    g_autofree char *file = g_strdup_printf("%s/%s", dir,
                                            QCRYPTO_TLS_CREDS_PSKFILE);

    g_assert_cmpint(g_mkdir(dir, 0700), ==, 0);
    write_key(file);
    qtest_qmp_assert_success(who, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'tls-creds-psk', 'id': 'psk',"
                             " 'endpoint': %s, 'dir': %s } }", endpoint, dir);
    migrate_set_parameter_str(who, "tls-creds", "psk");
}

static void remove_key(const char *endpoint)
{
    g_autofree char *dir = key_dir(endpoint);
    g_autofree char *file = g_strdup_printf("%s/%s", dir,
                                            QCRYPTO_TLS_CREDS_PSKFILE);

    test_tls_psk_cleanup(file);
    g_assert_cmpint(g_rmdir(dir), ==, 0);
}

static void remove_keys(void)
{
    remove_key("client");
    remove_key("server");
}

/*
 * Start a source that writes, and a target that waits for its snapshot
 *
 * Returns: the URI of the target, which the caller frees, or NULL if the test
 * is skipped
 */
static char *start(QTestState **from, QTestState **to, WriteKey *target_key)
{
    char *uri;

    if (!snapshot_start_running(from, to)) {
        return NULL;
    }
    add_credentials(*from, "client", test_tls_psk_init);
    add_credentials(*to, "server", target_key);
    snapshot_set_buffer_size(*from, SNAPSHOT_LARGE_BUFFER);
    uri = g_strdup_printf("unix:%s/migsocket", tmpfs);
    migrate_incoming_qmp(*to, uri, NULL, "{ 'exit-on-error': false }");
    return uri;
}

/* Likewise, and begin a snapshot of which the target takes nothing any more */
static bool start_held(QTestState **from, QTestState **to)
{
    g_autofree char *uri = start(from, to, test_tls_psk_init);

    if (!uri) {
        return false;
    }
    snapshot_begin(*from, uri);
    g_assert_cmpint(kill(qtest_pid(*to), SIGSTOP), ==, 0);
    snapshot_wait_for_sweeps(*from, 3);
    snapshot_assert_active(*from);
    return true;
}

/* The VM runs, and the next snapshot, to a file without TLS, succeeds */
static void retry(QTestState *from, QTestState *to)
{
    snapshot_wait_for_sweeps(from, 2);
    migrate_set_parameter_str(from, "tls-creds", "");
    snapshot_begin(from, snapshot_image_uri);
    wait_for_migration_complete(from);
    snapshot_wait_for_sweeps(from, 2);
    migrate_end(from, to, false);
    remove_keys();
}

/* What the guest writes meanwhile is not sent */
static void test_moment(void)
{
    QTestState *from, *to;

    if (!start_held(&from, &to)) {
        return;
    }
    g_assert_cmpint(kill(qtest_pid(to), SIGCONT), ==, 0);
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);
    snapshot_wait_for_status(to, "paused");
    check_guests_ram(to);
    snapshot_finish(from, to);
    remove_keys();
}

/* What the target does not take is waited for no longer */
static void test_cancel(void)
{
    const char *ungoals[] = { "completed", "failed", NULL };
    QTestState *from, *to;

    if (!start_held(&from, &to)) {
        return;
    }
    migrate_cancel(from);
    wait_for_migration_status(from, "cancelled", ungoals);
    g_assert_cmpint(kill(qtest_pid(to), SIGCONT), ==, 0);
    retry(from, to);
}

/* Source and target have different keys */
static void test_mismatch(void)
{
    QTestState *from, *to;
    g_autofree char *uri = start(&from, &to, test_tls_psk_init_alt);
    QDict *rsp;

    if (!uri) {
        return;
    }
    migrate_qmp(from, NULL, uri, NULL, "{}");
    wait_for_migration_fail(from, false);
    rsp = migrate_query(from);
    g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                            "TLS handshake failed"));
    qobject_unref(rsp);
    retry(from, to);
}

void migration_test_add_background_snapshot_tls(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    migration_test_add("/migration/background-snapshot/tls/moment",
                       test_moment);
    migration_test_add("/migration/background-snapshot/tls/cancel",
                       test_cancel);
    migration_test_add("/migration/background-snapshot/tls/mismatch",
                       test_mismatch);
}

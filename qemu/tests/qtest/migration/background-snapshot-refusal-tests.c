/*
 * QTest testcases for VMs that no background snapshot can be taken of
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Most have a device with which others write guest RAM, unseen by QEMU.  It is
 * plugged in when the capability is set already.
 */
#include "qemu/osdep.h"
#include <sys/socket.h>
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "standard-headers/linux/vhost_types.h"
#include "standard-headers/linux/virtio_config.h"

/* Returns: a VM without a guest, or NULL if the test is skipped */
static QTestState *start(const char *device, const char *options)
{
    QTestState *qts;

    if (!qtest_has_machine("pc") || !qtest_has_device(device)) {
        g_autofree char *reason = g_strdup_printf(
            "needs machine pc, for hotplug without a guest, and %s", device);

        g_test_skip(reason);
        return NULL;
    }
    qts = qtest_initf("-machine pc -m 16M %s", options);
    migrate_set_capability(qts, "background-snapshot", true);
    return qts;
}

static void check_refused(QTestState *qts, const char *why)
{
    g_autofree char *first = snapshot_first_trap(qts);
    g_auto(GStrv) traps = snapshot_list_traps(qts);
    g_autofree char *info = qtest_hmp(qts, "info snapshot_write_traps");
    size_t i;

    g_assert_null(first);
    for (i = 0; traps[i]; i++) {
        g_autofree char *reason = snapshot_trap_reason(qts, traps[i]);
        g_autofree char *line = g_strdup_printf("%s: not available: %s",
                                                traps[i], reason);

        g_assert_nonnull(strstr(reason, why));
        g_assert_nonnull(strstr(info, line));
        migrate_set_parameter_str(qts, "snapshot-write-trap", traps[i]);
        snapshot_assert_migrate_fails(qts, why);
    }
    migrate_set_parameter_str(qts, "snapshot-write-trap", "auto");
    snapshot_assert_migrate_fails(qts, why);
    snapshot_wait_for_status(qts, "running");

    migrate_set_capability(qts, "background-snapshot", false);
    snapshot_assert_capability_fails(qts, why);
}

static void test_ivshmem(void)
{
    QTestState *qts = start("ivshmem-plain", "-object memory-backend-ram,"
                            "id=ram,size=1M,share=on");

    if (!qts) {
        return;
    }
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'device_add', 'arguments': { 'id': 'shared',"
        " 'driver': 'ivshmem-plain', 'memdev': 'ram', 'master': 'on' } }");
    check_refused(qts, "/machine/peripheral/shared (ivshmem-plain)");
    qtest_quit(qts);
}

/* A vhost-user backend that can be migrated, and does nothing */
static void *run_backend(void *opaque)
{
    enum {
        GET_FEATURES = 1, GET_PROTOCOL_FEATURES = 15,
        VERSION = 1, IS_REPLY = 1 << 2,
        VHOST_USER_F_PROTOCOL_FEATURES = 30,
        VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1,
    };
    const uint64_t features = UINT64_C(1) << VHOST_F_LOG_ALL |
                              UINT64_C(1) << VIRTIO_F_VERSION_1 |
                              UINT64_C(1) << VHOST_USER_F_PROTOCOL_FEATURES;
    const uint64_t protocol_features = 1 << VHOST_USER_PROTOCOL_F_LOG_SHMFD;
    int fd = GPOINTER_TO_INT(opaque);
    struct {
        uint32_t request;
        uint32_t flags;
        uint32_t size;
        uint64_t payload;
    } QEMU_PACKED msg;
    const size_t header = offsetof(typeof(msg), payload);

    /* The ancillary data, file descriptors, is dropped */
    while (read(fd, &msg, header) == header) {
        char payload[4096];

        g_assert_cmpuint(msg.size, <=, sizeof(payload));
        if (msg.size && read(fd, payload, msg.size) != msg.size) {
            break;
        }
        if (msg.request != GET_FEATURES &&
            msg.request != GET_PROTOCOL_FEATURES) {
            continue;
        }
        msg.payload = msg.request == GET_FEATURES ? features :
                                                    protocol_features;
        msg.flags = VERSION | IS_REPLY;
        msg.size = sizeof(msg.payload);
        g_assert_cmpint(qemu_write_full(fd, &msg, sizeof(msg)), ==,
                        sizeof(msg));
    }
    close(fd);
    return NULL;
}

static void test_vhost_user(void)
{
    QTestState *qts = start("vhost-user-fs-pci", "");
    GThread *backend;
    int fds[2];

    if (!qts) {
        return;
    }
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), ==, 0);
    backend = g_thread_new("backend", run_backend, GINT_TO_POINTER(fds[0]));
    qtest_qmp_fds_assert_success(qts, &fds[1], 1, "{ 'execute': 'getfd',"
                                 " 'arguments': { 'fdname': 'backend' }}");
    close(fds[1]);
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'chardev-add', 'arguments': { 'id': 'backend',"
        " 'backend': { 'type': 'socket', 'data': { 'server': false,"
        " 'addr': { 'type': 'fd', 'data': { 'str': 'backend' } } } } } }");
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'device_add', 'arguments': {"
        " 'driver': 'vhost-user-fs-pci', 'chardev': 'backend', 'tag': 'fs' } }");
    check_refused(qts, "vhost-user or vhost-vdpa back end lets others write");
    qtest_quit(qts);
    g_thread_join(backend);
}

/* The hash page table is saved while the VM runs, as RAM of live migrations */
static void test_live_handler(void)
{
    QTestState *qts;

    if (!qtest_has_machine("pseries")) {
        g_test_skip("needs machine pseries");
        return;
    }
    qts = qtest_init("-machine pseries");
    snapshot_assert_capability_fails(qts, "'spapr/htab' can only be saved");
    qtest_quit(qts);
}

void migration_test_add_background_snapshot_refusals(void)
{
    migration_test_add("/migration/background-snapshot/refusal/live-handler",
                       test_live_handler);
    migration_test_add("/migration/background-snapshot/refusal/ivshmem",
                       test_ivshmem);
    migration_test_add("/migration/background-snapshot/refusal/vhost-user",
                       test_vhost_user);
}

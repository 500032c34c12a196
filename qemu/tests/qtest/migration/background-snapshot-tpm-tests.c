/*
 * QTest testcases for background snapshots of VMs with a TPM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "hw/acpi/tpm.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "tpm-emu.h"

#define COMMAND "\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x44\x00\x00"

#define TIMEOUT_S 60

#define RAM_START (1 * MiB)
#define RAM_SIZE (16 * MiB)

/*
 * The CRB's buffer is guest RAM.  When the guest starts a command that it has
 * written before the snapshot, the reply is read straight into trapped memory.
 */
static void take_with_tpm(QTestState *qts, const char *trap)
{
    uint64_t buffer = qtest_readq(qts, TPM_CRB_ADDR_BASE +
                                       A_CRB_CTRL_CMD_LADDR);
    int64_t end = g_get_monotonic_time() + TIMEOUT_S * G_USEC_PER_SEC;
    struct tpm_hdr reply;
    int sink;

    /* Request locality 0, and leave the idle state */
    qtest_writeb(qts, TPM_CRB_ADDR_BASE + A_CRB_LOC_CTRL, 1);
    qtest_writel(qts, TPM_CRB_ADDR_BASE + A_CRB_CTRL_REQ, 1);
    qtest_memwrite(qts, buffer, COMMAND, sizeof(COMMAND));

    migrate_set_parameter_str(qts, "snapshot-write-trap", trap);
    snapshot_set_buffer_size(qts, SNAPSHOT_SMALL_BUFFER);
    sink = snapshot_open_sink(qts, false);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate',"
                             " 'arguments': { 'uri': 'fd:sink' } }");
    qtest_qmp_eventwait(qts, "RESUME");

    /* The scanner has not come so far: there was no room */
    qtest_writel(qts, TPM_CRB_ADDR_BASE + A_CRB_CTRL_START, 1);
    while (qtest_readl(qts, TPM_CRB_ADDR_BASE + A_CRB_CTRL_START) & 1) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    qtest_memread(qts, buffer, &reply, sizeof(reply));
    g_assert_cmphex(be16_to_cpu(reply.tag), ==, TPM2_ST_NO_SESSIONS);
    g_assert_cmpuint(be32_to_cpu(reply.len), ==, sizeof(reply));
    g_assert_cmphex(be32_to_cpu(reply.code), ==, TPM_RC_FAILURE);

    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(qts);
    unlink(snapshot_image);
}

static void test_crb(void)
{
    TPMTestState tpm = {
        .addr = g_new0(SocketAddress, 1),
        .tpm_version = TPM_VERSION_2_0,
    };
    g_auto(GStrv) traps = NULL;
    GThread *thread;
    QTestState *qts;
    size_t i;

    if (!qtest_has_machine("pc") || !qtest_has_device("tpm-crb")) {
        g_test_skip("needs machine pc, for a VM without a guest, and tpm-crb");
        return;
    }
    tpm.addr->type = SOCKET_ADDRESS_TYPE_UNIX;
    tpm.addr->u.q_unix.path = g_strdup_printf("%s.tpm", snapshot_image);
    g_mutex_init(&tpm.data_mutex);
    g_cond_init(&tpm.data_cond);
    thread = g_thread_new(NULL, tpm_emu_ctrl_thread, &tpm);
    tpm_emu_test_wait_cond(&tpm);

    qts = qtest_initf("-machine pc -m 32M -chardev socket,id=chr,path=%s "
                      "-tpmdev emulator,id=dev,chardev=chr "
                      "-device tpm-crb,tpmdev=dev", tpm.addr->u.q_unix.path);
    /* More than the sink and the page buffer take */
    qtest_memset(qts, RAM_START, 0x55, RAM_SIZE);
    migrate_set_capability(qts, "background-snapshot", true);
    traps = snapshot_list_traps(qts);
    for (i = 0; traps[i]; i++) {
        g_autofree char *reason = snapshot_trap_reason(qts, traps[i]);

        if (reason) {
            g_test_message("%s: %s", traps[i], reason);
        } else {
            take_with_tpm(qts, traps[i]);
        }
    }
    qtest_quit(qts);
    g_thread_join(thread);
    g_unlink(tpm.addr->u.q_unix.path);
    qapi_free_SocketAddress(tpm.addr);
}

void migration_test_add_background_snapshot_tpm(void)
{
    migration_test_add("/migration/background-snapshot/tpm-crb", test_crb);
}

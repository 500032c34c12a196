/*
 * qemumigrationstatstest.c: statistics of a migration, and events about it
 *
 * Copyright (C) 2026 the background-snapshot authors
 *
 * This library is free software; you can redistribute it and/or
 * modify it under the terms of the GNU Lesser General Public
 * License as published by the Free Software Foundation; either
 * version 2.1 of the License, or (at your option) any later version.
 *
 * This library is distributed in the hope that it will be useful,
 * but WITHOUT ANY WARRANTY; without even the implied warranty of
 * MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the GNU
 * Lesser General Public License for more details.
 *
 * You should have received a copy of the GNU Lesser General Public
 * License along with this library.  If not, see
 * <http://www.gnu.org/licenses/>.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */

#include <config.h>

#include "qemu/qemu_domain.h"
#include "qemu/qemu_domainjob.h"
#include "qemu/qemu_migration.h"
#include "qemumonitortestutils.h"
#include "testutils.h"
#include "testutilsqemu.h"
#include "virtime.h"

#define VIR_FROM_THIS VIR_FROM_NONE

#define EVENT_PATIENCE_MS 2000

static virQEMUDriver driver;

struct testStatsData {
    const char *reply;
    int before;
    int expected;
};


static virDomainObj *
testStatsDomain(int status)
{
    g_autoptr(virDomainObj) vm = virDomainObjNew(driver.xmlopt);
    qemuDomainJobDataPrivate *privJob;

    if (!vm || !(vm->def = virDomainDefNew(driver.xmlopt)))
        return NULL;

    vm->def->name = g_strdup("test");
    vm->def->id = 1;

    if (virDomainObjBeginAsyncJob(vm, VIR_ASYNC_JOB_SNAPSHOT,
                                  VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, 0) < 0)
        return NULL;

    qemuDomainJobSetStatsType(vm->job->current,
                              QEMU_DOMAIN_JOB_STATS_TYPE_MIGRATION);
    privJob = vm->job->current->privateData;
    privJob->stats.mig.status = status;

    return g_steal_pointer(&vm);
}


static int
testStatsFetch(const void *opaque)
{
    const struct testStatsData *data = opaque;
    g_autoptr(virDomainObj) vm = testStatsDomain(data->before);
    g_autoptr(qemuMonitorTest) mon = NULL;
    qemuDomainObjPrivate *priv;
    qemuDomainJobDataPrivate *privJob;
    unsigned long long until;
    int rc;
    int ret = -1;

    if (!vm ||
        !(mon = qemuMonitorTestNew(driver.xmlopt, vm, NULL, NULL)) ||
        qemuMonitorTestAddItem(mon, "query-migrate", data->reply) < 0)
        return -1;

    privJob = vm->job->current->privateData;
    priv = vm->privateData;
    priv->mon = qemuMonitorTestGetMonitor(mon);
    virObjectUnlock(priv->mon);

    if (qemuMigrationAnyFetchStats(vm, VIR_ASYNC_JOB_SNAPSHOT,
                                   vm->job->current, NULL) < 0 ||
        virTimeMillisNow(&until) < 0)
        goto cleanup;

    /* Whether the event or we were first is up to the threads. */
    until += EVENT_PATIENCE_MS;
    while (privJob->stats.mig.status != data->expected) {
        if ((rc = virDomainObjWaitUntil(vm, until)) < 0)
            goto cleanup;

        if (rc > 0) {
            VIR_TEST_VERBOSE("status is %s, not %s",
                             qemuMonitorMigrationStatusTypeToString(privJob->stats.mig.status),
                             qemuMonitorMigrationStatusTypeToString(data->expected));
            goto cleanup;
        }
    }

    ret = 0;

 cleanup:
    virDomainObjEndAsyncJob(vm);
    virObjectLock(priv->mon);
    priv->mon = NULL;
    virDomainObjEndAPI(&vm);
    return ret;
}


static int
mymain(void)
{
    int ret = 0;

    if (qemuTestDriverInit(&driver) < 0)
        return EXIT_FAILURE;

    virEventRegisterDefaultImpl();

#define STATUS(status) "{\"return\": {\"status\": \"" status "\"}}"
#define EVENT(status) \
    "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 0}," \
    " \"event\": \"MIGRATION\", \"data\": {\"status\": \"" status "\"}}"

#define DO_TEST(name, answer, old, new) \
    do { \
        struct testStatsData data = { \
            answer, \
            QEMU_MONITOR_MIGRATION_STATUS_ ## old, \
            QEMU_MONITOR_MIGRATION_STATUS_ ## new \
        }; \
        if (virTestRun(name, testStatsFetch, &data) < 0) \
            ret = -1; \
    } while (0)

    DO_TEST("reply", STATUS("setup"), INACTIVE, SETUP);
    DO_TEST("event before it", EVENT("cancelled") "\r\n" STATUS("cancelled"),
            CANCELLING, CANCELLED);
    DO_TEST("event after it", STATUS("cancelling") "\r\n" EVENT("cancelled"),
            CANCELLING, CANCELLED);
    DO_TEST("two events after it", STATUS("setup") "\r\n" EVENT("cancelling") "\r\n"
            EVENT("cancelled"), SETUP, CANCELLED);

    qemuTestDriverFree(&driver);

    return ret == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

VIR_TEST_MAIN(mymain)

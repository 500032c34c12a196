/*
 * QTest testcases for what guests can do to a background snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "hw/pci/pci_regs.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"

/* See docs/specs/acpi_mem_hotplug.rst */
#define ACPI_SLOT 0xa00
#define ACPI_FLAGS 0xa14
#define ACPI_EJECT 8

/* Where the first DIMM is, with less than 4 GiB of other RAM */
#define DIMM_ADDRESS (4 * GiB)
#define DIMM_SIZE (64 * MiB)

#define DIMM_OPTIONS(backend) \
    "-m slots=2,maxmem=1G -object " backend ",id=mem1,size=64M " \
    "-device pc-dimm,id=dimm1,memdev=mem1"

/*
 * The guest takes out a DIMM, and then the user what it was made of: its RAM
 * must be in the image all the same
 */
static void test_eject(const char *options, const char *to_options)
{
    QTestState *from, *to;
    QDict *rsp;
    size_t i;
    int sink;

    if (!snapshot_start(&from, &to, options, to_options)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);
    qtest_memset(from, DIMM_ADDRESS, 0x5a, DIMM_SIZE);
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER + DIMM_SIZE);
    sink = snapshot_open_sink(from, false);
    snapshot_begin(from, "fd:sink");

    qtest_outl(from, ACPI_SLOT, 0);
    qtest_outb(from, ACPI_FLAGS, ACPI_EJECT);
    rsp = qtest_qmp(from, "{ 'execute': 'query-memory-devices' }");
    g_assert_true(qlist_empty(qdict_get_qlist(rsp, "return")));
    qobject_unref(rsp);
    qtest_qmp_assert_success(from, "{ 'execute': 'object-del',"
                             "  'arguments': { 'id': 'mem1' } }");

    snapshot_wait_for_sweeps(from, 3);
    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    snapshot_restore(to, "paused");
    for (i = 0; i < DIMM_SIZE; i += TEST_MEM_PAGE_SIZE) {
        g_assert_cmpint(qtest_readb(to, DIMM_ADDRESS + i), ==, 0x5a);
    }
    snapshot_finish(from, to);
}

static void test_eject_ram(void)
{
    test_eject(DIMM_OPTIONS("memory-backend-ram"),
               "-S " DIMM_OPTIONS("memory-backend-ram"));
}

/* The file is emptied */
#define DISCARDED "memory-backend-file,mem-path=/dev/shm,share=on," \
    "discard-data=on"

static void test_eject_discard(void)
{
    test_eject(DIMM_OPTIONS(DISCARDED), "-S " DIMM_OPTIONS(DISCARDED));
}

/* A virtio device without a driver but this test */
#define RNG_SLOT 0x1e
#define RNG_OPTIONS "-m 512M " \
    "-object rng-builtin,id=rng0 " \
    "-device virtio-rng-pci,disable-modern=on,addr=1e,rng=rng0"
#define RING_ADDRESS (end_address + 1 * MiB)
#define READ_ADDRESS (RING_ADDRESS + 1 * MiB)
#define READ_SIZE (256 * MiB)

static void pci_select(QTestState *who, uint8_t reg)
{
    qtest_outl(who, 0xcf8, (1U << 31) | (RNG_SLOT << 11) | reg);
}

/* Give the device one buffer to fill, of so many bytes */
static void read_random(QTestState *who)
{
    struct vring_desc desc = {
        .addr = cpu_to_le64(READ_ADDRESS),
        .len = cpu_to_le32(READ_SIZE),
        .flags = cpu_to_le16(VRING_DESC_F_WRITE),
    };
    struct {
        uint16_t flags, idx, first;
    } avail = { .idx = cpu_to_le16(1) };
    uint16_t port, num;

    pci_select(who, PCI_BASE_ADDRESS_0);
    port = qtest_inl(who, 0xcfc) & PCI_BASE_ADDRESS_IO_MASK;
    g_assert_cmpint(port, !=, 0);
    pci_select(who, PCI_COMMAND);
    qtest_outw(who, 0xcfc, PCI_COMMAND_IO | PCI_COMMAND_MASTER);

    qtest_outw(who, port + VIRTIO_PCI_QUEUE_SEL, 0);
    num = qtest_inw(who, port + VIRTIO_PCI_QUEUE_NUM);
    qtest_memset(who, RING_ADDRESS, 0, vring_size(num, 4096));
    qtest_memwrite(who, RING_ADDRESS, &desc, sizeof(desc));
    qtest_memwrite(who, RING_ADDRESS + num * sizeof(desc), &avail,
                   sizeof(avail));
    qtest_outl(who, port + VIRTIO_PCI_QUEUE_PFN, RING_ADDRESS >> 12);
    qtest_outb(who, port + VIRTIO_PCI_STATUS, 7);
    qtest_outw(who, port + VIRTIO_PCI_QUEUE_NOTIFY, 0);
}

typedef struct Trickle {
    int sink;
    bool stop;
} Trickle;

/* A destination that takes 2 MB/s */
static gpointer trickle_thread(gpointer opaque)
{
    Trickle *trickle = opaque;
    g_autofree char *buf = g_malloc(100000);

    while (!qatomic_read(&trickle->stop) &&
           read(trickle->sink, buf, 100000) > 0) {
        g_usleep(50 * 1000);
    }
    return NULL;
}

/*
 * A guest has a device write to very much of its memory at a time, in the main
 * loop: neither that nor the monitor may wait for the destination for long.
 */
static void test_large_request(void)
{
    QTestState *from, *to;
    Trickle trickle = {};
    int64_t start;
    GThread *thread;
    QDict *rsp;

    if (!snapshot_start(&from, &to, RNG_OPTIONS, "-S " RNG_OPTIONS)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);
    qtest_memset(from, READ_ADDRESS, 0x5a, READ_SIZE);
    migrate_set_parameter_str(from, "snapshot-write-trap", "mprotect");
    snapshot_set_buffer_size(from, SNAPSHOT_SMALL_BUFFER);
    trickle.sink = snapshot_open_sink(from, false);
    snapshot_begin(from, "fd:sink");
    thread = g_thread_new("trickle", trickle_thread, &trickle);

    start = g_get_monotonic_time();
    read_random(from);
    qtest_qmp_assert_success(from, "{ 'execute': 'query-status' }");
    /* A second, and what busy machines take; not the two minutes */
    g_assert_cmpint(g_get_monotonic_time() - start, <, 40 * G_USEC_PER_SEC);

    wait_for_migration_fail(from, true);
    rsp = migrate_query(from);
    g_assert_nonnull(strstr(qdict_get_str(rsp, "error-desc"),
                            "QEMU itself had to wait"));
    qobject_unref(rsp);
    qatomic_set(&trickle.stop, true);
    g_thread_join(thread);
    close(trickle.sink);

    snapshot_wait_for_sweeps(from, 2);
    migrate_set_parameter_str(from, "snapshot-write-trap", "auto");
    migrate_qmp(from, to, snapshot_image_uri, NULL, "{}");
    wait_for_migration_complete(from);
    snapshot_restore_and_finish(from, to);
}

void migration_test_add_background_snapshot_guests(void)
{
    migration_test_add("/migration/background-snapshot/guest/eject",
                       test_eject_ram);
    migration_test_add("/migration/background-snapshot/guest/eject-discard",
                       test_eject_discard);
    migration_test_add("/migration/background-snapshot/guest/large-request",
                       test_large_request);
}

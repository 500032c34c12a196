/*
 * QTest testcases for the write traps of background snapshots
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * For what the guest does, and what makes an image good, see
 * background-snapshot-tests.c.
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#ifdef CONFIG_LINUX
#include <linux/magic.h>
#include <sys/vfs.h>
#endif
#include "libqtest.h"
#include "migration/background-snapshot-util.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/memfd.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

/* RAM that the guest does not use, for QEMU's main thread to write */
#define SPARE_ADDRESS (end_address + 1 * MiB)
#define SPARE_SIZE (1 * MiB)

/* The most that the framework's guests, two of them, have */
#define HUGETLB_SIZE (2 * 256 * MiB)

/* Until a guest that works has written to all of its memory */
#define KVM_TIMEOUT_S 30

/* In the order in which auto tries them */
static const char *const traps[] = { "uffd-signal", "mprotect", "uffd-thread" };

static const struct {
    const char *name;
    const char *backend;
} memory_kinds[] = {
    { "anonymous", NULL },
    { "memfd", "-object memory-backend-memfd,id=ram,size=%s,share=on "
               "-machine memory-backend=ram" },
    { "hugetlb", "-object memory-backend-memfd,id=ram,size=%s,share=on,"
                 "hugetlb=on,hugetlbsize=2M -machine memory-backend=ram" },
};

static bool start(QTestState **from, QTestState **to, const char *accel,
                  const char *backend)
{
    MigrateStart args = {
        .accel = accel,
        .memory_backend = backend,
        .opts_target = "-S",
    };

    return snapshot_start_args(from, to, &args);
}

static void check_spare(QTestState *who, uint8_t value)
{
    g_autofree uint8_t *got = g_malloc(SPARE_SIZE);
    g_autofree uint8_t *wanted = g_malloc(SPARE_SIZE);

    memset(wanted, value, SPARE_SIZE);
    qtest_bufread(who, SPARE_ADDRESS, got, SPARE_SIZE);
    g_assert_cmpmem(got, SPARE_SIZE, wanted, SPARE_SIZE);
}

/*
 * Take a snapshot with @trap of a guest that writes, while the main thread
 * does as well; restore it; end both.
 */
static void take_and_restore(QTestState *from, QTestState *to,
                             const char *trap)
{
    QDict *rsp;
    int sink;

    migrate_set_capability(from, "background-snapshot", true);
    snapshot_set_buffer_size(from, SNAPSHOT_LARGE_BUFFER);
    qtest_memset(from, SPARE_ADDRESS, 0x11, SPARE_SIZE);
    sink = snapshot_open_sink(from, false);
    snapshot_begin(from, "fd:sink");

    /* No write waits for the destination, which has taken nothing yet */
    qtest_memset(from, SPARE_ADDRESS, 0x22, SPARE_SIZE);
    snapshot_wait_for_sweeps(from, 5);
    snapshot_read_sink(sink, 0);
    wait_for_migration_complete(from);
    g_assert_cmpstr(qdict_get_str(snapshot_query_figures(from, &rsp),
                                  "write-trap"), ==, trap);
    qobject_unref(rsp);

    snapshot_restore(to, "paused");
    check_spare(to, 0x11);
    check_spare(from, 0x22);
    snapshot_finish(from, to);
}

static bool have_huge_pages(void)
{
#if defined(CONFIG_LINUX) && defined(MFD_HUGETLB)
    int fd = qemu_memfd_create("probe", HUGETLB_SIZE, true, 2 * MiB, 0, NULL);
    void *host;

    if (fd < 0) {
        return false;
    }
    host = mmap(NULL, HUGETLB_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (host == MAP_FAILED) {
        return false;
    }
    munmap(host, HUGETLB_SIZE);
    return true;
#else
    return false;
#endif
}

/* The path's last parts are the trap and the kind of memory */
static void test_trap(void *path)
{
    g_autofree char *kind = g_path_get_basename(path);
    g_autofree char *dir = g_path_get_dirname(path);
    g_autofree char *trap = g_path_get_basename(dir);
    g_autofree char *reason = NULL;
    QTestState *from, *to;
    size_t i = 0;

    while (!g_str_equal(memory_kinds[i].name, kind)) {
        i++;
    }
    if (g_str_equal(kind, "hugetlb") && !have_huge_pages()) {
        g_test_skip("needs 512 MiB of free huge pages of 2 MiB");
        return;
    }
    if (!start(&from, &to, "tcg", memory_kinds[i].backend)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);

    if (g_str_equal(trap, "auto")) {
        g_autofree char *first = snapshot_first_trap(from);

        g_assert_nonnull(first);
        take_and_restore(from, to, first);
        return;
    }
    reason = snapshot_trap_reason(from, trap);
    if (reason) {
        g_test_skip(reason);
        migrate_end(from, to, false);
        return;
    }
    migrate_set_parameter_str(from, "snapshot-write-trap", trap);
    take_and_restore(from, to, trap);
}

/* Returns: a directory whose files' memory userfaultfd cannot protect */
static const char *find_disk(void)
{
#ifdef CONFIG_LINUX
    const char *dirs[] = { migration_get_env()->tmpfs, "." };
    struct statfs fs;
    size_t i;

    for (i = 0; i < ARRAY_SIZE(dirs); i++) {
        if (statfs(dirs[i], &fs) == 0 && fs.f_type != TMPFS_MAGIC &&
            fs.f_type != HUGETLBFS_MAGIC) {
            return dirs[i];
        }
    }
#endif
    return NULL;
}

/*
 * A trap that cannot trap writes to the VM's memory.  It is refused, which the
 * VM does not notice, and auto takes another one.
 */
static void test_file(void)
{
    static const char *const uffd[] = { "uffd-signal", "uffd-thread" };
    const char *disk = find_disk();
    g_autofree char *backend = NULL;
    g_autofree char *reason = NULL;
    QTestState *from, *to;
    QDict *info;
    size_t i;

    if (!disk) {
        g_test_skip("needs a directory on a disk");
        return;
    }
    /* Each VM has a file of its own, which QEMU deletes at once */
    backend = g_strdup_printf("-object memory-backend-file,id=ram,share=on,"
                              "size=%%s,mem-path=%s "
                              "-machine memory-backend=ram", disk);
    if (!start(&from, &to, "tcg", backend)) {
        return;
    }
    snapshot_wait_for_sweeps(from, 1);

    for (i = 0; i < ARRAY_SIZE(uffd); i++) {
        g_autofree char *why = snapshot_trap_reason(from, uffd[i]);

        g_assert_nonnull(why);
        if (strstr(why, "Cannot open userfaultfd")) {
            g_test_message("%s: %s", uffd[i], why);
        } else {
            g_assert_nonnull(strstr(why, "RAM block 'ram'"));
        }
        migrate_set_parameter_str(from, "snapshot-write-trap", uffd[i]);
        snapshot_assert_capability_fails(from, why);
        migrate_set_parameter_str(from, "snapshot-write-trap", "auto");
        migrate_set_capability(from, "background-snapshot", true);
        migrate_set_parameter_str(from, "snapshot-write-trap", uffd[i]);
        snapshot_assert_migrate_fails(from, why);
        migrate_set_capability(from, "background-snapshot", false);
    }
    info = migrate_query(from);
    g_assert_false(qdict_haskey(info, "status"));
    qobject_unref(info);
    g_assert_false(get_src()->stop_seen);
    snapshot_wait_for_sweeps(from, 1);

    migrate_set_parameter_str(from, "snapshot-write-trap", "auto");
    reason = snapshot_trap_reason(from, "mprotect");
    g_assert_cmpstr(reason, ==, NULL);
    take_and_restore(from, to, "mprotect");
}

static bool start_kvm(QTestState **from, QTestState **to)
{
    int64_t timeout = g_get_monotonic_time() + KVM_TIMEOUT_S * G_USEC_PER_SEC;
    bool enabled;
    QDict *rsp;

    if (!migration_get_env()->has_kvm) {
        g_test_skip("/dev/kvm is not there or must not be used");
        return false;
    }
    if (!start(from, to, "kvm", NULL)) {
        return false;
    }
    rsp = qtest_qmp_assert_success_ref(*from, "{ 'execute': 'query-kvm' }");
    enabled = qdict_get_bool(rsp, "enabled");
    qobject_unref(rsp);
    if (!enabled) {
        g_test_skip("the VM was started without KVM");
        migrate_end(*from, *to, false);
        return false;
    }
    while (!snapshot_last_byte(*from)) {
        if (g_get_monotonic_time() > timeout) {
            g_test_skip("the guest does not run under this host's KVM");
            migrate_end(*from, *to, false);
            return false;
        }
        g_usleep(10 * 1000);
    }
    return true;
}

/* What auto takes depends on whether KVM tells of stopped writes */
static void test_kvm_auto(void)
{
    g_autofree char *signal = NULL;
    g_autofree char *mprotect = NULL;
    g_autofree char *first = NULL;
    QTestState *from, *to;

    if (!start_kvm(&from, &to)) {
        return;
    }
    signal = snapshot_trap_reason(from, "uffd-signal");
    mprotect = snapshot_trap_reason(from, "mprotect");
    first = snapshot_first_trap(from);
    if (mprotect) {
        g_assert_nonnull(strstr(mprotect, "KVM"));
        g_assert_nonnull(signal);
        g_assert_nonnull(strstr(signal, "KVM"));
    }
    if (!first) {
        g_autofree char *why = snapshot_trap_reason(from, "uffd-thread");

        snapshot_assert_capability_fails(from, why);
        g_test_skip(why);
        migrate_end(from, to, false);
        return;
    }
    g_assert_cmpstr(first, ==, !signal ? "uffd-signal" :
                    !mprotect ? "mprotect" : "uffd-thread");
    take_and_restore(from, to, first);
}

/* The path's last part is the trap */
static void test_kvm_trap(void *path)
{
    g_autofree char *trap = g_path_get_basename(path);
    g_autofree char *reason = NULL;
    QTestState *from, *to;

    if (!start_kvm(&from, &to)) {
        return;
    }
    migrate_set_parameter_str(from, "snapshot-write-trap", trap);
    reason = snapshot_trap_reason(from, trap);
    if (reason) {
        snapshot_assert_capability_fails(from, reason);
        g_test_skip(reason);
        migrate_end(from, to, false);
        return;
    }
    take_and_restore(from, to, trap);
}

/* With a VM without a guest, which need not even have RAM */
static void test_write_trap(void)
{
    static const char *const values[] = {
        "mprotect", "uffd-signal", "uffd-thread", "auto",
    };
    QTestState *qts = qtest_init("-machine none");
    g_autofree char *before = qtest_hmp(qts, "info migrate_parameters");
    g_autofree char *after = NULL;
    size_t i;

    g_assert_nonnull(strstr(before, "snapshot-write-trap: auto\r\n"));
    for (i = 0; i < ARRAY_SIZE(values); i++) {
        g_autofree char *line = g_strdup_printf("snapshot-write-trap: %s\r\n",
                                                values[i]);
        g_autofree char *error = NULL;
        g_autofree char *info = NULL;

        error = qtest_hmp(qts, "migrate_set_parameter snapshot-write-trap %s",
                          values[i]);
        g_assert_cmpstr(error, ==, "");
        info = qtest_hmp(qts, "info migrate_parameters");
        g_assert_nonnull(strstr(info, line));
    }
    for (i = 0; i < ARRAY_SIZE(values); i++) {
        /* Asserts that it can be read back */
        migrate_set_parameter_str(qts, "snapshot-write-trap", values[i]);
    }

    migrate_set_parameter_str(qts, "snapshot-write-trap", "mprotect");
    snapshot_assert_error(qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'migrate-set-parameters',"
        " 'arguments': { 'snapshot-write-trap': 'uffd' } }"),
        "snapshot-write-trap");
    /* Refused is refused */
    after = qtest_hmp(qts, "info migrate_parameters");
    g_assert_nonnull(strstr(after, "snapshot-write-trap: mprotect\r\n"));
    qtest_quit(qts);
}

static void test_order(void)
{
    QTestState *qts = qtest_init("-machine none");
    g_auto(GStrv) listed = snapshot_list_traps(qts);
    size_t i;

    g_assert_cmpuint(g_strv_length(listed), ==, ARRAY_SIZE(traps));
    for (i = 0; i < ARRAY_SIZE(traps); i++) {
        g_assert_cmpstr(listed[i], ==, traps[i]);
    }
    qtest_quit(qts);
}

static void add_trap_test(const char *trap, const char *kind)
{
    g_autofree char *suffix = g_strdup_printf("%s/%s", trap, kind);

    migration_test_add_suffix("/migration/background-snapshot/trap/", suffix,
                              test_trap);
}

void migration_test_add_background_snapshot_traps(void)
{
    size_t i, j;

    for (i = 0; i < ARRAY_SIZE(memory_kinds); i++) {
        add_trap_test("auto", memory_kinds[i].name);
        for (j = 0; j < ARRAY_SIZE(traps); j++) {
            add_trap_test(traps[j], memory_kinds[i].name);
        }
    }
    migration_test_add("/migration/background-snapshot/trap/file", test_file);
    migration_test_add("/migration/background-snapshot/trap/order", test_order);
    migration_test_add("/migration/background-snapshot/write-trap",
                       test_write_trap);
    migration_test_add("/migration/background-snapshot/kvm/auto",
                       test_kvm_auto);
    for (j = 0; j < ARRAY_SIZE(traps); j++) {
        migration_test_add_suffix("/migration/background-snapshot/kvm/",
                                  traps[j], test_kvm_trap);
    }
}

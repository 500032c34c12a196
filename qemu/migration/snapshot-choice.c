/*
 * Background snapshot: which VMs it can be taken of, and with which write trap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-migration.h"
#include "qemu/rcu.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "hw/virtio/vhost.h"
#include "migration/misc.h"
#include "qom/object.h"
#include "system/kvm.h"
#include "system/qtest.h"
#include "system/tcg.h"
#include "host-pages.h"
#include "options.h"
#include "ram.h"
#include "savevm.h"
#include "snapshot-choice.h"
#include "snapshot-ram.h"

/*
 * QOM types whose devices let others write guest RAM behind QEMU's back, and
 * which nothing else tells of: most of what does disables discarding
 */
static const char *const foreign_writers[] = {
    /* Some mdev devices do not disable it (x-balloon-allowed) */
    "vfio-pci-base",
    "vfio-ap",
    "vfio-ccw",
    "ivshmem-common",
    "x-pci-proxy-dev",
    /* When it is not connected, there is no vhost device that tells of it */
    "vhost-user-blk",
    "vhost-user-scsi",
    NULL
};

static const InThreadTrapHooks *in_thread_hooks;

void snapshot_choice_set_in_thread_hooks(const InThreadTrapHooks *hooks)
{
    in_thread_hooks = hooks;
}

typedef struct DeviceSearch {
    const char *const *types;
    Object *found;
} DeviceSearch;

static int device_search_visit(Object *obj, void *opaque)
{
    DeviceSearch *search = opaque;
    const char *const *type;

    for (type = search->types; *type; type++) {
        if (object_dynamic_cast(obj, *type)) {
            search->found = obj;
            return 1;
        }
    }
    return 0;
}

bool snapshot_choice_find_device(const char *const *types, const char *why,
                                 Error **errp)
{
    DeviceSearch search = { .types = types };
    g_autofree char *path = NULL;

    object_child_foreach_recursive(object_get_root(), device_search_visit,
                                   &search);
    if (!search.found) {
        return false;
    }
    path = object_get_canonical_path(search.found);
    error_setg(errp, "%s (%s) %s", path, object_get_typename(search.found),
               why);
    return true;
}

/* Is there memory that the host's page tables do not lead to? */
static bool check_guest_memfd(Error **errp)
{
    RAMBlock *block;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(block) {
        if (block->flags & RAM_GUEST_MEMFD) {
            error_setg(errp, "RAM block '%s' is in a guest_memfd, where "
                       "writes cannot be trapped", block->idstr);
            return false;
        }
    }
    return true;
}

/* Can all be saved, and does some trap see all writers of guest RAM? */
static bool check_vm(Error **errp)
{
    const char *handler = qemu_savevm_other_live_handler();

    if (handler) {
        error_setg(errp, "'%s' can only be saved bit by bit while it changes, "
                   "not as it was at one moment; stop the VM and migrate it "
                   "without background-snapshot instead", handler);
        return false;
    }
    if (!tcg_enabled() && !qtest_enabled() && !kvm_enabled()) {
        error_setg(errp, "There is no write trap for this accelerator");
        return false;
    }
    if (current_machine && current_machine->cgs) {
        error_setg(errp, "The memory of a confidential guest cannot be read");
        return false;
    }
    if (!check_guest_memfd(errp)) {
        return false;
    }
    if (snapshot_choice_find_device(foreign_writers, "lets others write guest "
                                    "RAM, which cannot be trapped", errp)) {
        return false;
    }
    if (vhost_in_use(VHOST_BACKEND_TYPE_USER) ||
        vhost_in_use(VHOST_BACKEND_TYPE_VDPA)) {
        error_setg(errp, "A vhost-user or vhost-vdpa back end lets others "
                   "write guest RAM, which cannot be trapped");
        return false;
    }
    if (ram_block_discard_is_disabled()) {
        error_setg(errp, "Guest RAM is pinned for a device of the host (such "
                   "as by VFIO, or an nvme:// or blkio disk), whose writes "
                   "cannot be trapped");
        return false;
    }
    return true;
}

static bool no_fault(void *host, void *opaque)
{
    return false;
}

/* Would the host trap writes to the VM's memory?  Tries. */
static bool check_memory(const WriteTrapOps *ops, Error **errp)
{
    ERRP_GUARD();
    WriteTrap *trap = ops->new(NULL, 0, no_fault, NULL, errp);
    bool ok = true;
    size_t huge_size = host_pages_huge_size();
    RAMBlock *block;

    if (!trap) {
        return false;
    }
    if (!ops->arms_untouched) {
        HostPages *pages;

        if (qemu_target_page_size() > qemu_real_host_page_size()) {
            error_setg(errp, "It would miss parts of the guest's pages, which "
                       "are larger than the host's");
            ops->free(trap);
            return false;
        }
        pages = host_pages_new(true, errp);

        if (!pages) {
            ops->free(trap);
            return false;
        }
        host_pages_free(pages);
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_NOT_IGNORED(block) {
        ok = snapshot_ram_check_page_size(block->page_size,
                                          qemu_target_page_size(), errp) &&
             (block->flags & RAM_READONLY ||
              /*
               * All of it is alike, and to give it up again takes time; but
               * the host splits a huge page that is no part of it as a whole
               */
              ops->add(trap, block->host,
                       MIN(ROUND_UP(block->used_length, block->page_size),
                           MAX(block->page_size,
                               QEMU_PTR_IS_ALIGNED(block->host, huge_size ?: 1)
                               ? huge_size : 0)), errp));
        if (!ok) {
            error_prepend(errp, "RAM block '%s': ", block->idstr);
            break;
        }
    }
    ops->free(trap);
    return ok;
}

/*
 * Does the host merge pages of the VM's at the moment?  When it does, it maps
 * them anew, and forgets that userfaultfd has protected them (mm/ksm.c,
 * replace_page()): a write then goes through without being stopped.
 */
static bool check_merging(const WriteTrapOps *ops, Error **errp)
{
    g_autofree char *text = NULL;

    if (ops->survives_merging || !current_machine ||
        !current_machine->mem_merge ||
        !g_file_get_contents("/sys/kernel/mm/ksm/run", &text, NULL, NULL) ||
        text[0] != '1') {
        return true;
    }
    error_setg(errp, "The host's KSM would lift the protection of pages that "
               "it merges; stop it for the time of the snapshot (write 0 to "
               "/sys/kernel/mm/ksm/run), or run the VM with "
               "-machine mem-merge=off");
    return false;
}

/* In the order in which auto tries them, which is that of the QAPI enum */
#define FIRST_TRAP (SNAPSHOT_WRITE_TRAP_AUTO + 1)

static const WriteTrapOps *find_trap(SnapshotWriteTrap name)
{
    return write_trap_find(SnapshotWriteTrap_str(name));
}

static bool check_trap(const WriteTrapOps *ops, Error **errp)
{
    if (!ops) {
        error_setg(errp, "This host's operating system does not have it");
        return false;
    }
    return (!ops->in_thread || in_thread_hooks->check(ops, errp)) &&
           check_merging(ops, errp) && check_memory(ops, errp);
}

/* Whether a trap is possible, and if not, why */
static SnapshotWriteTrapInfo *ask_trap(SnapshotWriteTrap name)
{
    SnapshotWriteTrapInfo *info = g_new0(SnapshotWriteTrapInfo, 1);
    Error *err = NULL;

    info->trap = name;
    info->available = check_vm(&err) && check_trap(find_trap(name), &err);
    if (err) {
        info->reason = g_strdup(error_get_pretty(err));
        error_free(err);
    }
    return info;
}

const WriteTrapOps *
snapshot_choice_make(SnapshotWriteTrapInfoList **passed_over, Error **errp)
{
    ERRP_GUARD();
    SnapshotWriteTrap wanted = migrate_snapshot_write_trap();
    g_autoptr(SnapshotWriteTrapInfoList) others = NULL;
    g_autoptr(GString) reasons = g_string_new(NULL);
    SnapshotWriteTrapInfoList **tail = &others;
    SnapshotWriteTrap name;

    if (!check_vm(errp)) {
        error_prepend(errp, "Background-snapshot is not possible: ");
        return NULL;
    }
    for (name = FIRST_TRAP; name < SNAPSHOT_WRITE_TRAP__MAX; name++) {
        SnapshotWriteTrapInfo *info;

        if (wanted != SNAPSHOT_WRITE_TRAP_AUTO && wanted != name) {
            continue;
        }
        info = ask_trap(name);
        if (info->available) {
            qapi_free_SnapshotWriteTrapInfo(info);
            if (passed_over) {
                *passed_over = g_steal_pointer(&others);
            }
            return find_trap(name);
        }
        g_string_append_printf(reasons, "%s%s: %s", reasons->len ? "; " : "",
                               SnapshotWriteTrap_str(name), info->reason);
        QAPI_LIST_APPEND(tail, info);
    }
    error_setg(errp, "Background-snapshot is not possible with "
               "snapshot-write-trap=%s: %s", SnapshotWriteTrap_str(wanted),
               reasons->str);
    return NULL;
}

void snapshot_choice_begin(const WriteTrapOps *ops)
{
    if (ops->in_thread) {
        in_thread_hooks->begin(ops);
    }
}

void snapshot_choice_end(const WriteTrapOps *ops)
{
    if (ops->in_thread) {
        in_thread_hooks->end(ops);
    }
}

SnapshotWriteTrapInfoList *qmp_query_snapshot_write_traps(Error **errp)
{
    SnapshotWriteTrapInfoList *list = NULL, **tail = &list;
    SnapshotWriteTrap name;

    if (migration_is_running()) {
        error_setg(errp, "Write traps cannot be tried out while a migration "
                   "is running");
        return NULL;
    }
    for (name = FIRST_TRAP; name < SNAPSHOT_WRITE_TRAP__MAX; name++) {
        QAPI_LIST_APPEND(tail, ask_trap(name));
    }
    return list;
}

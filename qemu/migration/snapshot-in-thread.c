/*
 * Background snapshot: traps that are handled in the writing thread
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * Where the thread that writes has to handle its own fault, each of the VM's
 * writers must be able to, or what it will write be saved beforehand.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/iov.h"
#include "qemu/memory-fault.h"
#include "qemu/module.h"
#include "hw/virtio/vhost.h"
#include "migration/snapshot-before-write.h"
#include "migration/snapshot-hooks.h"
#include "system/kvm.h"
#include "snapshot-choice.h"

/*
 * QOM types of devices whose libraries write guest RAM in threads of their
 * own, which block SIGBUS as they were not made by qemu_thread_create()
 */
static const char *const sigbus_blockers[] = {
    "pci-qxl",
    "virtio-gpu-rutabaga-device",
    NULL
};

/* NULL: if vCPUs run in the kernel, their stopped writes cannot be told */
static bool (*vcpu_check)(Error **errp);

bool snapshot_traps_kernel_writes;

void background_snapshot_set_vcpu_check(bool (*check)(Error **errp))
{
    vcpu_check = check;
}

void background_snapshot_release_iov(QEMUIOVector *qiov, size_t offset,
                                     size_t size)
{
    size_t head, tail;
    int i, n;
    struct iovec *iov = qemu_iovec_slice(qiov, offset, size, &head, &tail, &n);

    /* The parts at the ends will be written as well, or the read fails */
    for (i = 0; i < n; i++) {
        background_snapshot_release(iov[i].iov_base, iov[i].iov_len);
    }
}

/* Do all writers handle their own faults, or can be told from in advance? */
static bool in_thread_check(const WriteTrapOps *ops, Error **errp)
{
    if (kvm_enabled() && !vcpu_check) {
        error_setg(errp, "KVM does not tell which of the guest's writes was "
                   "stopped");
        return false;
    }
    if (vcpu_check && !vcpu_check(errp)) {
        return false;
    }
    if (vhost_in_use(VHOST_BACKEND_TYPE_KERNEL)) {
        error_setg(errp, "A vhost device in the host's kernel does not tell "
                   "which of its writes was stopped");
        return false;
    }
    return !ops->raises_sigbus ||
           !snapshot_choice_find_device(sigbus_blockers, "has threads that "
                                        "block SIGBUS", errp);
}

static void in_thread_begin(const WriteTrapOps *ops)
{
    qatomic_set(&snapshot_traps_kernel_writes, true);
    if (ops->raises_sigbus) {
        memory_fault_allow_sigbus(true);
    }
}

static void in_thread_end(const WriteTrapOps *ops)
{
    qatomic_set(&snapshot_traps_kernel_writes, false);
    if (ops->raises_sigbus) {
        memory_fault_allow_sigbus(false);
    }
}

static const InThreadTrapHooks in_thread_hooks = {
    .check = in_thread_check,
    .begin = in_thread_begin,
    .end = in_thread_end,
};

static void in_thread_register(void)
{
    snapshot_choice_set_in_thread_hooks(&in_thread_hooks);
}

migration_init(in_thread_register)

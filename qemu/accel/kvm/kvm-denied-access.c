/*
 * KVM: accesses that the host denies, because a write trap of QEMU's is there
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <linux/kvm.h>
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "hw/core/cpu.h"
#include "qemu/error-report.h"
#include "qemu/memory-fault.h"
#include "qemu/rcu.h"
#include "system/kvm_int.h"

AddressSpace *kvm_vcpu_address_space(CPUState *cpu, MemTxAttrs attrs)
{
    /* Guests can get into SMM by themselves, also if the machine has none */
    int as_id = cpu->num_ases > 1 ? cpu_asidx_from_attrs(cpu, attrs) : 0;

    return (as_id < kvm_state->nr_as ? kvm_state->as[as_id].as : NULL) ?:
           &address_space_memory;
}

/* Where QEMU has RAM that is not in guest_memfd, or NULL */
static void *denied_ram(CPUState *cpu, hwaddr gpa, MemTxAttrs attrs)
{
    hwaddr xlat, len = 1;
    MemoryRegion *mr;

    RCU_READ_LOCK_GUARD();
    mr = address_space_translate(kvm_vcpu_address_space(cpu, attrs), gpa, &xlat,
                                 &len, true, attrs);
    if (!memory_region_is_ram(mr) || memory_region_has_guest_memfd(mr)) {
        return NULL;
    }
    return memory_region_get_ram_ptr(mr) + xlat;
}

int kvm_handle_denied_access(CPUState *cpu, struct kvm_run *run,
                             MemTxAttrs attrs)
{
    hwaddr gpa = run->memory_fault.gpa;
    uint64_t flags = run->memory_fault.flags;
    void *host = denied_ram(cpu, gpa, attrs);

    if (!host || flags & KVM_MEMORY_EXIT_FLAG_PRIVATE) {
        return 1;
    }
    if (memory_fault_handle(host)) {
        return 0;
    }
    error_report("kvm run failed: the host denies %s guest memory at 0x%"
                 HWADDR_PRIx, flags & KVM_MEMORY_EXIT_FLAG_WRITE ?
                 "writing" : "reading", gpa);
    return -EFAULT;
}

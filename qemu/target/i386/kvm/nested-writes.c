/*
 * KVM: guest memory that is written past all of a snapshot's write traps
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <linux/kvm.h>
#include "qapi/qapi-types-migration.h"
#include "qemu/rcu.h"
#include "exec/memory.h"
#include "migration/client-options.h"
#include "migration/snapshot-hooks.h"
#include "system/hw_accel.h"
#include "system/kvm_int.h"
#include "system/runstate.h"
#include "cpu.h"
#include "kvm_i386.h"

/* In Linux's struct vmcs12, whose layout is that of KVM_GET_NESTED_STATE */
#define VMCS12_VIRTUAL_APIC_PAGE 96
#define VMCS12_POSTED_INTR_DESC 112
#define POSTED_INTR_DESC_SIZE 64

/* In Hyper-V's virtual processor assist page: the current enlightened VMCS */
#define VP_ASSIST_IN_USE 1
#define VP_ASSIST_NESTED_VMCS 48

void kvm_release_ram(int as_id, hwaddr gpa, hwaddr size)
{
    RCU_READ_LOCK_GUARD();
    while (size) {
        hwaddr xlat, len = size;
        MemoryRegion *mr =
            address_space_translate(kvm_state->as[as_id].as, gpa, &xlat, &len,
                                    true, MEMTXATTRS_UNSPECIFIED);

        if (memory_region_is_ram(mr)) {
            background_snapshot_release(memory_region_get_ram_ptr(mr) + xlat,
                                        len);
        }
        gpa += len;
        size -= len;
    }
}

/*
 * While a guest's guest runs with VMX, the CPU and KVM write two of its pages
 * by their physical addresses, and so past every trap; an enlightened VMCS as
 * long as it is current.  KVM looked them up when it began to use them.  With
 * SVM there are none.
 */
static void nested_writes_of_vcpu(X86CPU *cpu)
{
    CPUX86State *env = &cpu->env;
    struct kvm_nested_state *state = env->nested_state;

    if (!state || state->format != KVM_STATE_NESTED_FORMAT_VMX) {
        return;
    }
    if (state->flags & KVM_STATE_NESTED_GUEST_MODE) {
        const uint8_t *vmcs12 = state->data.vmx[0].vmcs12;

        kvm_release_ram(0, ldq_le_p(vmcs12 + VMCS12_VIRTUAL_APIC_PAGE),
                        TARGET_PAGE_SIZE);
        kvm_release_ram(0, ldq_le_p(vmcs12 + VMCS12_POSTED_INTR_DESC),
                        POSTED_INTR_DESC_SIZE);
    }
    if (state->flags & KVM_STATE_NESTED_EVMCS &&
        env->msr_hv_vapic & VP_ASSIST_IN_USE) {
        hwaddr assist = env->msr_hv_vapic & TARGET_PAGE_MASK;

        kvm_release_ram(0, address_space_ldq_le(kvm_state->as[0].as,
                                                assist + VP_ASSIST_NESTED_VMCS,
                                                MEMTXATTRS_UNSPECIFIED, NULL),
                        TARGET_PAGE_SIZE);
    }
}

/* Called before the vCPUs run */
static void nested_writes_vm_state_change(void *opaque, bool running,
                                          RunState state)
{
    CPUState *cs;

    if (!running || !migrate_background_snapshot()) {
        return;
    }
    CPU_FOREACH(cs) {
        cpu_synchronize_state(cs);
        nested_writes_of_vcpu(X86_CPU(cs));
    }
}

void kvm_nested_writes_init(void)
{
    qemu_add_vm_change_state_handler(nested_writes_vm_state_change, NULL);
}

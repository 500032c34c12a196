/*
 * KVM: guest memory that the kernel writes of its own accord
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * With KVM_CAP_MEMORY_FAULT_DENIED, KVM tells of a write that the host denies:
 * one by the guest, or by KVM in order to execute the guest's instruction.  Not
 * among it is what the guest has asked KVM to write whenever there is something
 * to tell.  The capability's section in Linux's Documentation/virt/kvm/api.rst
 * lists both.  Some memory for a guest's guests is written past all traps.
 */
#include "qemu/osdep.h"
#include <linux/kvm.h>
#include "qapi/error.h"
#include "qapi/qapi-types-migration.h"
#include "qemu/rcu.h"
#include "exec/memory.h"
#include "hw/i386/apic_internal.h"
#include "hw/xen/xen.h"
#include "migration/client-options.h"
#include "migration/snapshot-hooks.h"
#include "standard-headers/asm-x86/kvm_para.h"
#include "system/hw_accel.h"
#include "system/kvm_int.h"
#include "system/runstate.h"
#include "cpu.h"
#include "kvm_i386.h"

/* Registers of KVM's: bit 0 says that it is in use, the lowest are flags */
#define MSR_IN_USE      1
#define MSR_ADDRESS     (~0x3full)

/* An area begins at MSR_ADDRESS or up to 63 bytes behind it; 64 are the most */
#define MSR_AREA_SIZE   128

/* "SMRAM state-save area" in AMD's manual, volume 2; the same with Intel */
#define SMM_STATE       0xfe00
#define SMM_STATE_SIZE  0x200
#define SMBASE_AT_RESET 0x30000

/* In Linux's struct vmcs12, whose layout is that of KVM_GET_NESTED_STATE */
#define VMCS12_VIRTUAL_APIC_PAGE 96
#define VMCS12_POSTED_INTR_DESC 112
#define POSTED_INTR_DESC_SIZE 64

/* In Hyper-V's virtual processor assist page: the current enlightened VMCS */
#define VP_ASSIST_IN_USE 1
#define VP_ASSIST_NESTED_VMCS 48

static void own_write(int as_id, hwaddr gpa, hwaddr size)
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

/* SMM can be off, or not be KVM's */
static bool kvm_has_smm_ram(void)
{
    return kvm_state->nr_as > X86ASIdx_SMM && kvm_state->as[X86ASIdx_SMM].as;
}

static void own_writes_of_vcpu(X86CPU *cpu)
{
    CPUX86State *env = &cpu->env;
    const uint64_t msrs[] = {
        env->system_time_msr, env->steal_time_msr, env->async_pf_en_msr,
        env->pv_eoi_en_msr,
    };
    size_t i;

    for (i = 0; i < ARRAY_SIZE(msrs); i++) {
        if (msrs[i] & MSR_IN_USE) {
            own_write(0, msrs[i] & MSR_ADDRESS, MSR_AREA_SIZE);
        }
    }
    if (cpu->apic_state && APIC_COMMON(cpu->apic_state)->vapic_paddr) {
        own_write(0, APIC_COMMON(cpu->apic_state)->vapic_paddr,
                  sizeof(uint32_t));
    }
    if (kvm_has_smm_ram()) {
        own_write(X86ASIdx_SMM, env->smbase + SMM_STATE, SMM_STATE_SIZE);
        own_write(X86ASIdx_SMM, SMBASE_AT_RESET + SMM_STATE, SMM_STATE_SIZE);
    }
}

/*
 * While a guest's guest runs with VMX, the CPU and KVM write two of its pages
 * by their physical addresses, and so past every trap; an enlightened VMCS as
 * long as it is current.  KVM looked them up when it began to use them.  With
 * SVM there are none.
 */
static void own_writes_past_traps(X86CPU *cpu)
{
    CPUX86State *env = &cpu->env;
    struct kvm_nested_state *state = env->nested_state;

    if (!state || state->format != KVM_STATE_NESTED_FORMAT_VMX) {
        return;
    }
    if (state->flags & KVM_STATE_NESTED_GUEST_MODE) {
        const uint8_t *vmcs12 = state->data.vmx[0].vmcs12;

        own_write(0, ldq_le_p(vmcs12 + VMCS12_VIRTUAL_APIC_PAGE),
                  TARGET_PAGE_SIZE);
        own_write(0, ldq_le_p(vmcs12 + VMCS12_POSTED_INTR_DESC),
                  POSTED_INTR_DESC_SIZE);
    }
    if (state->flags & KVM_STATE_NESTED_EVMCS &&
        env->msr_hv_vapic & VP_ASSIST_IN_USE) {
        hwaddr assist = env->msr_hv_vapic & TARGET_PAGE_MASK;

        own_write(0, address_space_ldq_le(kvm_state->as[0].as,
                                          assist + VP_ASSIST_NESTED_VMCS,
                                          MEMTXATTRS_UNSPECIFIED, NULL),
                  TARGET_PAGE_SIZE);
    }
}

/* Called before the vCPUs run */
static void own_writes_vm_state_change(void *opaque, bool running,
                                       RunState state)
{
    CPUState *cs;

    if (!running || !migrate_background_snapshot()) {
        return;
    }
    CPU_FOREACH(cs) {
        cpu_synchronize_state(cs);
        own_writes_past_traps(X86_CPU(cs));
        if (qatomic_read(&background_snapshot_armed)) {
            own_writes_of_vcpu(X86_CPU(cs));
        }
    }
}

static bool own_writes_are_known(Error **errp)
{
    CPUState *cs;

    if (xen_mode == XEN_EMULATE) {
        error_setg(errp, "KVM writes memory of Xen's guests unseen");
        return false;
    }
    CPU_FOREACH(cs) {
        X86CPU *cpu = X86_CPU(cs);

        if (hyperv_enabled(cpu)) {
            error_setg(errp, "KVM writes guest memory unseen for Hyper-V "
                       "enlightenments (hv-*)");
            return false;
        }
        if (cpu->env.features[FEAT_1_ECX] & CPUID_EXT_VMX ||
            cpu->env.features[FEAT_8000_0001_ECX] & CPUID_EXT3_SVM) {
            error_setg(errp, "KVM writes guest memory unseen for a guest that "
                       "may run guests of its own (CPU feature vmx or svm)");
            return false;
        }
    }
    return true;
}

void kvm_own_writes_init(KVMState *s)
{
    qemu_add_vm_change_state_handler(own_writes_vm_state_change, NULL);
    if (!kvm_vm_check_extension(s, KVM_CAP_MEMORY_FAULT_DENIED) ||
        kvm_vm_enable_cap(s, KVM_CAP_MEMORY_FAULT_DENIED, 0, 1)) {
        return;
    }
    background_snapshot_set_vcpu_check(own_writes_are_known);
}

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
 * lists both.
 */
#include "qemu/osdep.h"
#include <linux/kvm.h>
#include "qapi/error.h"
#include "qemu/rcu.h"
#include "exec/memory.h"
#include "hw/i386/apic_internal.h"
#include "hw/xen/xen.h"
#include "migration/snapshot-before-write.h"
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
            kvm_release_ram(0, msrs[i] & MSR_ADDRESS, MSR_AREA_SIZE);
        }
    }
    if (cpu->apic_state && APIC_COMMON(cpu->apic_state)->vapic_paddr) {
        kvm_release_ram(0, APIC_COMMON(cpu->apic_state)->vapic_paddr,
                        sizeof(uint32_t));
    }
    if (kvm_has_smm_ram()) {
        kvm_release_ram(X86ASIdx_SMM, env->smbase + SMM_STATE, SMM_STATE_SIZE);
        kvm_release_ram(X86ASIdx_SMM, SMBASE_AT_RESET + SMM_STATE,
                        SMM_STATE_SIZE);
    }
}

/* Called before the vCPUs run */
static void own_writes_vm_state_change(void *opaque, bool running,
                                       RunState state)
{
    CPUState *cs;

    if (!running || !qatomic_read(&snapshot_traps_kernel_writes)) {
        return;
    }
    CPU_FOREACH(cs) {
        cpu_synchronize_state(cs);
        own_writes_of_vcpu(X86_CPU(cs));
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

/*
 * A guest without a system: has KVM write to memory that it never writes itself,
 * and tells how often it has seen KVM do so.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Ten times a second it prints
 *
 *   kvm clock=<n> steal=<n> eoi=<n> absent=<n> ready=<n> smm=<n>
 *
 * clock and steal are the versions of kvmclock and of the stolen time; eoi is
 * how many interrupts came with the PV EOI flag set; absent and ready how many
 * asynchronous page faults were told of, and how many of their ends.  These come
 * only if the guest's memory is such that reading it takes the host time.  smm
 * counts stores that KVM emulates to memory that there is in SMM alone.
 *
 * The registers and structures are those of Linux's
 * Documentation/virt/kvm/x86/msr.rst.
 */
#include "bare.h"

/* Each area is far from all others, and from all that the guest writes. */
#define AREA(n) ((volatile uint32_t *)((40u << 20) + ((n) << 17)))
#define CLOCK AREA(0)
#define STEAL AREA(1)
#define EOI AREA(2)
#define ASYNC_PF AREA(3)
#define SMM_STORES AREA(4)
#define SMM_STORES_ADDRESS 0x2880000

/* In words */
#define CLOCK_VERSION 0
#define STEAL_VERSION 2
#define ASYNC_PF_FLAGS 0
#define ASYNC_PF_TOKEN 1

#define MSR_SYSTEM_TIME 0x4b564d01
#define MSR_ASYNC_PF 0x4b564d02
#define MSR_STEAL_TIME 0x4b564d03
#define MSR_PV_EOI 0x4b564d04
#define MSR_ASYNC_PF_INT 0x4b564d06
#define MSR_ASYNC_PF_ACK 0x4b564d07
#define ENABLE 1
/* Enabled, also while CPL is 0, the end by an interrupt */
#define ENABLE_ASYNC_PF (1 | 2 | 8)

/* What is read for the first time, step by step: unlikely to be cached */
#define READ_FIRST (64u << 20)
#define READ_END (224u << 20)
#define READ_STEP (256u << 10)

#define APIC(reg) (*(volatile uint32_t *)(0xfee00000 + (reg)))
#define APIC_EOI 0xb0
#define APIC_SPURIOUS 0xf0
#define APIC_TIMER 0x320
#define APIC_LINT0 0x350
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_DIVIDE 0x3e0
#define APIC_ENABLE 0x100
#define APIC_PERIODIC 0x20000
#define APIC_MASKED 0x10000
#define APIC_DIVIDE_BY_16 3
/* KVM's local APIC counts nanoseconds */
#define TICK (10000000 / 16)
#define TICKS_A_LINE 10

#define PAGE_FAULT_VECTOR 14
#define TIMER_VECTOR 0x40
#define READY_VECTOR 0x41
#define SPURIOUS_VECTOR 0xff

#define PIC1_MASK 0x21
#define PIC2_MASK 0xa1

#define CR0_PG_PE 0x80000001
#define CR4_PSE 0x10
#define PDE_PRESENT_WRITABLE_4M 0x83

/* Of the Q35's memory controller; see Intel's data sheet of the 3 Series */
#define PCI_ADDRESS 0xcf8
#define PCI_DATA 0xcfc
#define PCI_ENABLE 0x80000000
#define SMRAM_CONTROL 0x9d
#define SMRAM_CLOSED 0x0a
#define SMRAM_OPEN 0x4a
#define TSEG_CONTROL 0x9e
#define TSEG_1M 0x01
/* Where SeaBIOS has CPU 0 enter SMM; the end of the RAM, from TSEG on, in SMM */
#define SMI_ENTRY 0xa8000
#define TSEG_STORES 0x0ff80000
#define APM_CONTROL 0xb2

struct frame;

struct gate {
    uint16_t offset_low, selector, type, offset_high;
};

static struct gate idt[256];
static const struct table idt_table = { sizeof(idt) - 1, idt };
static uint32_t __attribute__((aligned(4096))) page_directory[1024];
static volatile uint32_t ticks, eois, absent, ready;

/* Stores to TSEG what was there plus one, by KVM's emulator, and shows it */
asm(".pushsection .text\n"
    ".code16\n"
    "smi_handler:\n"
    "movl $" NUMBER(TSEG_STORES) ", %ebx\n"
    "movl (%ebx), %eax\n"
    "incl %eax\n"
    "ud2; .ascii \"kvm\"\n"
    "movl %eax, (%ebx)\n"
    "movl (%ebx), %eax\n"
    "movl $" NUMBER(SMM_STORES_ADDRESS) ", %ebx\n"
    "movl %eax, (%ebx)\n"
    "rsm\n"
    "smi_handler_end:\n"
    ".code32\n"
    ".popsection\n");
extern const uint8_t smi_handler[], smi_handler_end[];
_Static_assert(SMM_STORES_ADDRESS == (uint32_t)SMM_STORES, "");

static void wrmsr(uint32_t msr, uint32_t value)
{
    asm volatile("wrmsr" : : "c"(msr), "a"(value), "d"(0) : "memory");
}

static __attribute__((interrupt)) void on_timer(struct frame *frame)
{
    (void)frame;
    ticks++;
    eois += *EOI & 1;
    /* Also if the flag says that there is no need to: KVM takes it back. */
    APIC(APIC_EOI) = 0;
}

static __attribute__((interrupt)) void on_page_fault(struct frame *frame,
                                                     unsigned int error)
{
    (void)frame;
    (void)error;
    if (!(ASYNC_PF[ASYNC_PF_FLAGS] & 1)) {
        say("kvm BAD page fault of no asynchronous kind\n");
        for (;;) {
            asm volatile("cli; hlt");
        }
    }
    absent++;
    ASYNC_PF[ASYNC_PF_FLAGS] = 0;
}

static __attribute__((interrupt)) void on_ready(struct frame *frame)
{
    (void)frame;
    ready += ASYNC_PF[ASYNC_PF_TOKEN] != 0;
    ASYNC_PF[ASYNC_PF_TOKEN] = 0;
    wrmsr(MSR_ASYNC_PF_ACK, 1);
    APIC(APIC_EOI) = 0;
}

static void set_gate(unsigned int vector, const void *handler)
{
    uintptr_t offset = (uintptr_t)handler;

    idt[vector] = (struct gate) { offset, CODE_SELECTOR, 0x8e00, offset >> 16 };
}

/* Each address is mapped to itself: without paging, no page fault is told of */
static void enable_paging(void)
{
    for (uint32_t i = 0; i < 1024; i++) {
        page_directory[i] = i << 22 | PDE_PRESENT_WRITABLE_4M;
    }
    asm volatile("mov %0, %%cr4\n"
                 "mov %1, %%cr3\n"
                 "mov %2, %%cr0\n"
                 : : "r"(CR4_PSE), "r"(page_directory), "r"(CR0_PG_PE)
                 : "memory");
}

static void write_mch(unsigned int reg, uint8_t value)
{
    outl(PCI_ADDRESS, PCI_ENABLE | (reg & ~3u));
    outb(PCI_DATA + (reg & 3), value);
}

static void set_smi_handler(void)
{
    volatile uint8_t *entry = (volatile uint8_t *)SMI_ENTRY;

    *(volatile uint32_t *)TSEG_STORES = 0;
    write_mch(TSEG_CONTROL, TSEG_1M);
    write_mch(SMRAM_CONTROL, SMRAM_OPEN);
    for (const uint8_t *from = smi_handler; from < smi_handler_end; from++) {
        *entry++ = *from;
    }
    write_mch(SMRAM_CONTROL, SMRAM_CLOSED);
}

static void run(void)
{
    uint32_t next_line = 0, at = READ_END;

    set_smi_handler();
    enable_paging();
    asm volatile("lidt %0" : : "m"(idt_table));
    set_gate(PAGE_FAULT_VECTOR, on_page_fault);
    set_gate(TIMER_VECTOR, on_timer);
    set_gate(READY_VECTOR, on_ready);

    outb(PIC1_MASK, 0xff);
    outb(PIC2_MASK, 0xff);
    APIC(APIC_SPURIOUS) = APIC_ENABLE | SPURIOUS_VECTOR;
    APIC(APIC_LINT0) = APIC_MASKED;
    APIC(APIC_TIMER_DIVIDE) = APIC_DIVIDE_BY_16;
    APIC(APIC_TIMER) = APIC_PERIODIC | TIMER_VECTOR;
    APIC(APIC_TIMER_INITIAL) = TICK;

    wrmsr(MSR_SYSTEM_TIME, (uint32_t)CLOCK | ENABLE);
    wrmsr(MSR_STEAL_TIME, (uint32_t)STEAL | ENABLE);
    wrmsr(MSR_PV_EOI, (uint32_t)EOI | ENABLE);
    wrmsr(MSR_ASYNC_PF_INT, READY_VECTOR);
    wrmsr(MSR_ASYNC_PF, (uint32_t)ASYNC_PF | ENABLE_ASYNC_PF);

    say("guest ready\n");
    asm volatile("sti");
    for (;;) {
        asm volatile("hlt");
        if (ticks < next_line) {
            continue;
        }
        next_line = ticks + TICKS_A_LINE;
        outb(APM_CONTROL, 1);
        say_number("kvm clock=", CLOCK[CLOCK_VERSION]);
        say_number(" steal=", STEAL[STEAL_VERSION]);
        say_number(" eoi=", eois);
        say_number(" absent=", absent);
        say_number(" ready=", ready);
        say_number(" smm=", *SMM_STORES);
        say("\n");
        at = at > READ_FIRST ? at - READ_STEP : READ_END;
        (void)*(volatile uint32_t *)at;
    }
}

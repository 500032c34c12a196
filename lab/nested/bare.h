/*
 * What guests without a system share: how they start, and lines for the host.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * QEMU starts them through PVH, on one CPU without paging and interrupts.  Such
 * a program defines run().  Its lines go to the second serial port.
 */
#ifndef BARE_H
#define BARE_H

#include <stdint.h>

#define COM2 0x2f8
#define COM_STATUS 5
#define COM_CAN_SEND 0x20

#define CODE_SELECTOR 8
#define DATA_SELECTOR 16
#define STACK_SIZE 16384
#define STRING(x) #x
#define NUMBER(x) STRING(x)

struct __attribute__((packed)) table {
    uint16_t limit;
    const void *base;
};

/* Flat: unused, code, data */
static const uint64_t gdt[] = { 0, 0xcf9b000000ffff, 0xcf93000000ffff };
static const struct table __attribute__((used)) gdt_table =
    { sizeof(gdt) - 1, gdt };
static uint8_t __attribute__((used, aligned(16))) stack[STACK_SIZE];

static void __attribute__((used, noreturn)) run(void);

asm(".pushsection .note.Xen, \"a\", @note\n"
    ".long 4, 4, 18\n"
    ".asciz \"Xen\"\n"
    ".long start\n"
    ".popsection\n"
    ".pushsection .text\n"
    ".globl start\n"
    "start:\n"
    "lgdt gdt_table\n"
    "ljmp $" NUMBER(CODE_SELECTOR) ", $1f\n"
    "1: mov $" NUMBER(DATA_SELECTOR) ", %eax\n"
    "mov %eax, %ds\n"
    "mov %eax, %es\n"
    "mov %eax, %ss\n"
    "mov $stack + " NUMBER(STACK_SIZE) ", %esp\n"
    "call run\n"
    ".popsection\n");

static inline void outb(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outl(uint16_t port, uint32_t value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;

    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void say(const char *text)
{
    for (; *text; text++) {
        while (!(inb(COM2 + COM_STATUS) & COM_CAN_SEND)) {
        }
        outb(COM2, *text);
    }
}

static inline void say_number(const char *name, uint32_t value)
{
    char digits[11], *first = digits + sizeof(digits) - 1;

    *first = 0;
    do {
        *--first = '0' + value % 10;
        value /= 10;
    } while (value);
    say(name);
    say(first);
}

#endif

/*
 * Memory whose accesses raise a signal, for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/resource.h>
#ifdef CONFIG_LINUX
#include <sys/syscall.h>
#endif
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/host-utils.h"
#include "qemu/thread.h"
#include "memory-fault-helpers.h"

/* To be mapped, so that each access is beyond its end */
static int empty_file = -1;

size_t fault_page_size(void)
{
    return qemu_real_host_page_size();
}

static int open_empty_file(void)
{
    g_autofree char *name = NULL;
    int fd = g_file_open_tmp(NULL, &name, NULL);

    g_assert_cmpint(fd, >=, 0);
    unlink(name);
    return fd;
}

static void map_page(void *host, int prot, int flags, int fd)
{
    void *page = QEMU_ALIGN_PTR_DOWN(host, fault_page_size());

    g_assert_true(mmap(page, fault_page_size(), prot, MAP_FIXED | flags, fd,
                       0) == page);
}

uint8_t *fault_map(int sig, size_t num_pages)
{
    uint8_t *host = mmap(NULL, num_pages * fault_page_size(), PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    size_t i;

    g_assert(host != MAP_FAILED);
    for (i = 0; i < num_pages; i++) {
        fault_deny(sig, host + i * fault_page_size());
    }
    return host;
}

void fault_deny(int sig, void *host)
{
    if (sig == SIGBUS) {
        if (empty_file < 0) {
            empty_file = open_empty_file();
        }
        map_page(host, PROT_READ | PROT_WRITE, MAP_SHARED, empty_file);
    } else {
        map_page(host, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    }
}

void fault_allow(void *host)
{
    map_page(host, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

void write_byte(uint8_t *host)
{
    qatomic_set(host, 1);
}

static bool opener_fn(void *host, void *opaque)
{
    Opener *o = opaque;

    o->calls++;
    o->host = host;
    o->thread = pthread_self();
    if (!o->refuse) {
        fault_allow(host);
    }
    return !o->refuse;
}

void opener_add(Opener *o, int sig, void *start, size_t size)
{
    o->handler.signal = sig;
    o->handler.start = start;
    o->handler.size = size;
    o->handler.fn = opener_fn;
    o->handler.opaque = o;
    memory_fault_handler_add(&o->handler, &error_abort);
}

bool sigbus_blocked(void)
{
    sigset_t set;

    pthread_sigmask(SIG_BLOCK, NULL, &set);
    return sigismember(&set, SIGBUS);
}

void in_thread(void *(*fn)(void *), void *opaque)
{
    QemuThread thread;

    qemu_thread_create(&thread, "fault", fn, opaque, QEMU_THREAD_JOINABLE);
    qemu_thread_join(&thread);
}

#ifdef CONFIG_LINUX
void send_memory_error(int code, void *host)
{
    siginfo_t info = {
        .si_signo = SIGBUS,
        .si_code = code,
        .si_addr = host,
        .si_addr_lsb = ctz64(fault_page_size()),
    };

    g_assert_cmpint(syscall(SYS_rt_tgsigqueueinfo, getpid(),
                            qemu_get_thread_id(), SIGBUS, &info), ==, 0);
}
#endif

int killed_by(void (*fn)(void))
{
    pid_t pid = fork();
    int status;

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        const struct rlimit no_core = { 0, 0 };

        setrlimit(RLIMIT_CORE, &no_core);
        /* Should the fault be repeated for ever */
        alarm(30);
        fn();
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

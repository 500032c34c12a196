/*
 * A channel whose writes can be ended from outside
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#include "qemu/osdep.h"
#ifndef _WIN32
#include <sys/wait.h>
#endif
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/module.h"
#include "io/channel-command.h"
#include "snapshot-channel.h"

/* For a command that is to end: from SIGTERM to SIGKILL, and between looks */
#define COMMAND_GRACE_US (1 * G_USEC_PER_SEC)
#define COMMAND_POLL_US (10 * 1000)

#define TYPE_SNAPSHOT_CHANNEL "snapshot-channel"
OBJECT_DECLARE_SIMPLE_TYPE(SnapshotChannel, SNAPSHOT_CHANNEL)

struct SnapshotChannel {
    QIOChannel parent;
    /* Does not block */
    QIOChannel *inner;
    /* Where the writing thread waits for @inner or for the shutdown */
    GMainContext *context;
    bool shutdown;
    bool closed;
};

QIOChannel *snapshot_channel_new(QIOChannel *ioc)
{
    SnapshotChannel *sc;

    if (qio_channel_has_feature(ioc, QIO_CHANNEL_FEATURE_SHUTDOWN)) {
        return QIO_CHANNEL(object_ref(OBJECT(ioc)));
    }

    sc = SNAPSHOT_CHANNEL(object_new(TYPE_SNAPSHOT_CHANNEL));
    sc->inner = QIO_CHANNEL(object_ref(OBJECT(ioc)));
    qio_channel_set_blocking(ioc, false, NULL);
    qio_channel_set_feature(QIO_CHANNEL(sc), QIO_CHANNEL_FEATURE_SHUTDOWN);
    if (qio_channel_has_feature(ioc, QIO_CHANNEL_FEATURE_SEEKABLE)) {
        qio_channel_set_feature(QIO_CHANNEL(sc), QIO_CHANNEL_FEATURE_SEEKABLE);
    }
    return QIO_CHANNEL(sc);
}

static gboolean snapshot_channel_ready(QIOChannel *ioc, GIOCondition condition,
                                       gpointer opaque)
{
    *(bool *)opaque = true;
    return G_SOURCE_REMOVE;
}

static void snapshot_channel_wait(SnapshotChannel *sc)
{
    GSource *source = qio_channel_create_watch(sc->inner, G_IO_OUT | G_IO_HUP |
                                                          G_IO_ERR);
    bool ready = false;

    g_source_set_callback(source, (GSourceFunc)snapshot_channel_ready, &ready,
                          NULL);
    g_source_attach(source, sc->context);
    while (!ready && !qatomic_read(&sc->shutdown)) {
        g_main_context_iteration(sc->context, true);
    }
    g_source_destroy(source);
    g_source_unref(source);
}

static ssize_t snapshot_channel_writev(QIOChannel *ioc,
                                       const struct iovec *iov, size_t niov,
                                       int *fds, size_t nfds, int flags,
                                       Error **errp)
{
    SnapshotChannel *sc = SNAPSHOT_CHANNEL(ioc);
    ssize_t ret;

    while (!qatomic_read(&sc->shutdown)) {
        ret = qio_channel_writev_full(sc->inner, iov, niov, fds, nfds, flags,
                                      errp);
        if (ret != QIO_CHANNEL_ERR_BLOCK) {
            return ret;
        }
        snapshot_channel_wait(sc);
    }
    error_setg(errp, "The destination was shut down");
    return -1;
}

/* Only files can, and they need no waiting */
static ssize_t snapshot_channel_pwritev(QIOChannel *ioc,
                                        const struct iovec *iov, size_t niov,
                                        off_t offset, Error **errp)
{
    return qio_channel_pwritev(SNAPSHOT_CHANNEL(ioc)->inner, iov, niov, offset,
                               errp);
}

static ssize_t snapshot_channel_readv(QIOChannel *ioc, const struct iovec *iov,
                                      size_t niov, int **fds, size_t *nfds,
                                      int flags, Error **errp)
{
    return qio_channel_readv_full(SNAPSHOT_CHANNEL(ioc)->inner, iov, niov, fds,
                                  nfds, flags, errp);
}

static int snapshot_channel_shutdown(QIOChannel *ioc, QIOChannelShutdown how,
                                     Error **errp)
{
    SnapshotChannel *sc = SNAPSHOT_CHANNEL(ioc);

    qatomic_set(&sc->shutdown, true);
    g_main_context_wakeup(sc->context);
    return 0;
}

#ifndef _WIN32
static void snapshot_channel_close_fds(QIOChannelCommand *command)
{
    if (command->writefd != -1) {
        close(command->writefd);
    }
    if (command->readfd != -1 && command->readfd != command->writefd) {
        close(command->readfd);
    }
    command->readfd = command->writefd = -1;
}

/*
 * The command has the whole image, and is waited for, until a shutdown.  Then
 * all processes of its session are ended, before they can see the image end,
 * which they would take for whole.
 */
static int snapshot_channel_close_command(SnapshotChannel *sc,
                                          QIOChannelCommand *command,
                                          Error **errp)
{
    const pid_t group = -command->pid;
    int64_t kill_time = 0;
    bool killed = false;
    int status = 0;
    int ret = 0;

    for (;;) {
        if (!kill_time && qatomic_read(&sc->shutdown)) {
            kill(group, SIGTERM);
            kill_time = g_get_monotonic_time() + COMMAND_GRACE_US;
        } else if (!kill_time) {
            snapshot_channel_close_fds(command);
        } else if (!killed && g_get_monotonic_time() > kill_time) {
            kill(group, SIGKILL);
            killed = true;
        }

        if (ret == 0) {
            ret = RETRY_ON_EINTR(waitpid(command->pid, &status, WNOHANG));
        }
        /* If others of the group are left, its number is not used again */
        if (ret != 0 && (!kill_time || killed || kill(group, 0) < 0)) {
            break;
        }
        g_usleep(COMMAND_POLL_US);
    }
    snapshot_channel_close_fds(command);
    command->pid = -1;

    if (ret < 0) {
        error_setg(errp, "Cannot wait for the command");
        return -1;
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        error_setg(errp, "The command has failed");
        return -1;
    }
    return 0;
}
#endif

static int snapshot_channel_close(QIOChannel *ioc, Error **errp)
{
    SnapshotChannel *sc = SNAPSHOT_CHANNEL(ioc);
#ifndef _WIN32
    QIOChannelCommand *command =
        (QIOChannelCommand *)object_dynamic_cast(OBJECT(sc->inner),
                                                 TYPE_QIO_CHANNEL_COMMAND);
#endif

    if (sc->closed) {
        return 0;
    }
    sc->closed = true;

#ifndef _WIN32
    if (command) {
        return snapshot_channel_close_command(sc, command, errp);
    }
#endif
    /* Others may have the same file open */
    qio_channel_set_blocking(sc->inner, true, NULL);
    return qio_channel_close(sc->inner, errp);
}

bool snapshot_channel_finish(QIOChannel *ioc, bool whole, Error **errp)
{
    if (!object_dynamic_cast(OBJECT(ioc), TYPE_SNAPSHOT_CHANNEL)) {
        return true;
    }
    if (!whole) {
        qio_channel_shutdown(ioc, QIO_CHANNEL_SHUTDOWN_BOTH, NULL);
    }
    return qio_channel_close(ioc, errp) == 0;
}

/* For its user the channel always blocks */
static int snapshot_channel_set_blocking(QIOChannel *ioc, bool enabled,
                                         Error **errp)
{
    assert(enabled);
    return 0;
}

static GSource *snapshot_channel_create_watch(QIOChannel *ioc,
                                              GIOCondition condition)
{
    return qio_channel_create_watch(SNAPSHOT_CHANNEL(ioc)->inner, condition);
}

static off_t snapshot_channel_seek(QIOChannel *ioc, off_t offset, int whence,
                                   Error **errp)
{
    return qio_channel_io_seek(SNAPSHOT_CHANNEL(ioc)->inner, offset, whence,
                               errp);
}

static void snapshot_channel_init(Object *obj)
{
    SNAPSHOT_CHANNEL(obj)->context = g_main_context_new();
}

static void snapshot_channel_finalize(Object *obj)
{
    SnapshotChannel *sc = SNAPSHOT_CHANNEL(obj);

    g_main_context_unref(sc->context);
    object_unref(OBJECT(sc->inner));
}

static void snapshot_channel_class_init(ObjectClass *klass, void *data)
{
    QIOChannelClass *ioc_klass = QIO_CHANNEL_CLASS(klass);

    ioc_klass->io_writev = snapshot_channel_writev;
    ioc_klass->io_pwritev = snapshot_channel_pwritev;
    ioc_klass->io_readv = snapshot_channel_readv;
    ioc_klass->io_set_blocking = snapshot_channel_set_blocking;
    ioc_klass->io_seek = snapshot_channel_seek;
    ioc_klass->io_close = snapshot_channel_close;
    ioc_klass->io_shutdown = snapshot_channel_shutdown;
    ioc_klass->io_create_watch = snapshot_channel_create_watch;
}

static const TypeInfo snapshot_channel_info = {
    .parent = TYPE_QIO_CHANNEL,
    .name = TYPE_SNAPSHOT_CHANNEL,
    .instance_size = sizeof(SnapshotChannel),
    .instance_init = snapshot_channel_init,
    .instance_finalize = snapshot_channel_finalize,
    .class_init = snapshot_channel_class_init,
};

static void snapshot_channel_register(void)
{
    type_register_static(&snapshot_channel_info);
}

type_init(snapshot_channel_register);

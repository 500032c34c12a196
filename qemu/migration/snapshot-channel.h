/*
 * A channel whose writes can be ended from outside
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_CHANNEL_H
#define MIGRATION_SNAPSHOT_CHANNEL_H

#include "io/channel.h"

/**
 * snapshot_channel_new: wrap a channel that cannot be shut down
 *
 * A write to a pipe that nobody reads would last for ever, and so would
 * cancelling the snapshot.  The new channel can be shut down, by any thread: a
 * write that is waiting fails then, and so does each one after it.
 *
 * Closing the channel waits for a command that is the destination.  If the
 * channel was or is shut down, the command and all that it has started are
 * ended, with SIGKILL if SIGTERM does not help.  Closing fails if the command
 * has failed, and does nothing if the channel is closed already.
 *
 * @ioc: the channel to wrap; a command leads a session of its own
 *
 * Returns: a new channel with a reference to @ioc; or @ioc itself, with a new
 * reference, if it can be shut down
 */
QIOChannel *snapshot_channel_new(QIOChannel *ioc);

/**
 * snapshot_channel_finish: close a channel that may take long to close
 *
 * Another thread may shut the channel down meanwhile.  Does nothing if @ioc was
 * not wrapped: closing a socket takes no time, and must not be done while it
 * may be shut down.
 *
 * @whole: whether all has been written; if not, shuts the channel down first
 *
 * Returns: true, or false with @errp set
 */
bool snapshot_channel_finish(QIOChannel *ioc, bool whole, Error **errp);

#endif

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
 * Closing the channel waits for a command that is the destination, and ends it
 * first if the channel was shut down.  It fails if the command has failed.
 *
 * @ioc: the channel to wrap
 *
 * Returns: a new channel with a reference to @ioc; or @ioc itself, with a new
 * reference, if it can be shut down
 */
QIOChannel *snapshot_channel_new(QIOChannel *ioc);

#endif

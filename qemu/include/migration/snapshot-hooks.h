/*
 * Background snapshot: what the rest of QEMU must tell it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 */
#ifndef MIGRATION_SNAPSHOT_HOOKS_H
#define MIGRATION_SNAPSHOT_HOOKS_H

/**
 * background_snapshot_release: save a range, and let it be written
 *
 * For who discards guest RAM, or writes it in a way that no write trap sees.
 * Any thread; may wait for room in the page buffer.
 *
 * @host: start of the range
 * @size: its size in bytes
 */
void background_snapshot_release(void *host, size_t size);

#endif

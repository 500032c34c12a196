/*
 * Page buffer: the bounded pool of page copies of a background snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Copyright (c) 2026 the background-snapshot authors
 *
 * A slot goes round: producers take it, fill it and queue it; a consumer
 * dequeues it, writes it out and gives it back.  All memory is allocated by
 * page_buffer_new(), so producers may be signal handlers.
 *
 * All functions may be called by any number of threads at a time, except
 * page_buffer_new() and page_buffer_free().
 */
#ifndef MIGRATION_PAGE_BUFFER_H
#define MIGRATION_PAGE_BUFFER_H

typedef struct PageBuffer PageBuffer;

/* What a slot holds; written by who has taken or dequeued the slot */
typedef struct PageBufferEntry {
    /* Whose page it is and where; means nothing to the buffer */
    void *owner;
    uint64_t offset;
    /*
     * So many pages from there are all zeroes, and the slot's data was not
     * filled.  0: the slot holds one page.
     */
    uint64_t zero_pages;
} PageBufferEntry;

/**
 * page_buffer_new: create a page buffer
 *
 * The host's memory is taken only as slots are filled, and some ahead of that;
 * slots that were used before are used first.
 *
 * @size: bytes; at least one slot, fewer than 2^32 slots
 * @slot_size: bytes of a page, a power of two
 *
 * Returns: the buffer, or NULL with @errp set
 */
PageBuffer *page_buffer_new(size_t size, size_t slot_size, Error **errp);

/* Nobody may use the buffer any more */
void page_buffer_free(PageBuffer *pb);

/**
 * page_buffer_take: take slots, wait for the first ones
 *
 * What is taken at a time is in order, as far as can be: then slots of pages
 * that follow one another do so as well.
 *
 * More than @min slots are given only while an eighth of the buffer is left,
 * and the last 32nd only to who is urgent.
 *
 * @slots: filled with the slots taken
 * @min: number of slots to wait for, at least one
 * @max: greatest number of slots of use
 * @urgent: others wait for the caller
 * @deadline_ms: when to give up, by g_get_monotonic_time() / 1000
 * @waited: set to true if it had to wait, else unchanged
 *
 * Returns: the number of slots taken; 0 if page_buffer_stop() was called, or
 * if the time ran out
 */
size_t page_buffer_take(PageBuffer *pb, uint32_t *slots, size_t min,
                        size_t max, bool urgent, int64_t deadline_ms,
                        bool *waited);

/**
 * page_buffer_try_take: take slots if enough of the buffer is left
 *
 * For those who leave room for others that cannot wait.  A buffer with nothing
 * in it gives @min slots in any case, unless somebody waits for them.
 *
 * @leave: number of slots to leave
 *
 * Returns: the number of slots taken, at least @min and at most @max; 0 if
 * there is not enough room or page_buffer_stop() was called
 */
size_t page_buffer_try_take(PageBuffer *pb, uint32_t *slots, size_t min,
                            size_t max, size_t leave);

/**
 * page_buffer_give: give slots back: unused, or written out
 */
void page_buffer_give(PageBuffer *pb, const uint32_t *slots, size_t n);

/* Returns: what a slot holds, for the caller who has taken or dequeued it */
PageBufferEntry *page_buffer_entry(PageBuffer *pb, uint32_t slot);

/* Returns: the page's memory of a slot, likewise */
void *page_buffer_data(PageBuffer *pb, uint32_t slot);

/**
 * page_buffer_queue: queue filled slots for a consumer, in order
 *
 * After page_buffer_stop(), the slots are given back instead.
 */
void page_buffer_queue(PageBuffer *pb, const uint32_t *slots, size_t n);

/**
 * page_buffer_dequeue: take queued slots out, the oldest first
 *
 * @slots: filled with up to @max slots
 * @wait: until something is queued, or no slot is out that may be
 *
 * Returns: the number of slots; 0 if nothing is queued, and after
 * page_buffer_stop()
 */
size_t page_buffer_dequeue(PageBuffer *pb, uint32_t *slots, size_t max,
                           bool wait);

/* Returns: how often slots have been given back, for page_buffer_wait() */
unsigned int page_buffer_given(PageBuffer *pb);

/**
 * page_buffer_wait: wait until something is queued, or slots are given back,
 * or there is nothing to wait for
 *
 * @given: what page_buffer_given() returned before the caller found neither
 */
void page_buffer_wait(PageBuffer *pb, unsigned int given);

/**
 * page_buffer_warm: have the host allocate what will be filled next
 *
 * So that it need not while a producer fills it.  For consumers to call now and
 * then.
 */
void page_buffer_warm(PageBuffer *pb);

/**
 * page_buffer_stop: wake everybody who waits; nobody waits from now on
 */
void page_buffer_stop(PageBuffer *pb);

size_t page_buffer_num_slots(PageBuffer *pb);

/* Returns: how many wait for slots in page_buffer_take() */
size_t page_buffer_waiting(PageBuffer *pb);

/* Returns: the number of slots that are in use, and the greatest that were */
size_t page_buffer_used(PageBuffer *pb);
size_t page_buffer_peak(PageBuffer *pb);

#endif

/*
 * A key-value store in memory, as busy as the guest can be.
 *
 *   keyvalue TABLE_MB
 *
 * A hash table of TABLE_MB, three quarters full: half of the operations get a
 * random key's value and check it, the other half put a new one.  Reports the
 * number of operations so far as "ops <n>".
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "lab.h"

#define VALUE_WORDS 15

typedef struct Entry {
    uint64_t key;               /* 0: free */
    uint64_t value[VALUE_WORDS];
} Entry;

static Entry *table;
static size_t slots;

/* Where @key is, or may be put: linear probing. */
static Entry *find(uint64_t key)
{
    size_t i = page_seed(0, key, 0) % slots;

    while (table[i].key && table[i].key != key) {
        i = (i + 1) % slots;
    }
    return &table[i];
}

static void put(uint64_t key, uint64_t word)
{
    Entry *e = find(key);

    e->key = key;
    for (int i = 0; i < VALUE_WORDS; i++, word += key) {
        e->value[i] = word;
    }
}

static void get(uint64_t key)
{
    const Entry *e = find(key);

    for (int i = 1; i < VALUE_WORDS; i++) {
        if (e->key != key || e->value[i] != e->value[i - 1] + key) {
            say("keyvalue BAD value of key %lu", (unsigned long)key);
            exit(1);
        }
    }
}

int main(int argc, char **argv)
{
    size_t bytes = argc == 2 ? (size_t)atoi(argv[1]) << 20 : 0;
    uint64_t x = STEP, keys;

    slots = bytes / sizeof(Entry);
    keys = slots / 4 * 3;
    if (!keys) {
        errx(1, "usage: keyvalue TABLE_MB");
    }
    table = get_memory(bytes);
    for (uint64_t key = 1; key <= keys; key++) {
        put(key, key);
    }
    for (uint64_t operations = 0;; operations++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if (x >> 63) {
            put(x % keys + 1, x);
        } else {
            get(x % keys + 1);
        }
        /* Looking at the clock takes as long as several operations. */
        if (operations % 64 == 0) {
            report_operations(operations);
        }
    }
}

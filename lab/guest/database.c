/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A database under constant writes: SQLite with its log on the guest's disk.
 *
 *   database run FILE     insert row after row, each in a transaction of its
 *                         own; after row n is on the disk: "db commit n"
 *   database count FILE CACHE_MB
 *                         the same, but reports only now and then, "ops n", and
 *                         has CACHE_MB of memory that hold data
 *   database check FILE   "db rows=N ok", or a line with BAD in it
 *
 * Row n holds 200 bytes that follow from n, and their checksum.  Row numbers
 * are contiguous: a check finds lost, doubled and damaged rows.
 */
#include <sqlite3.h>

#include "lab.h"

#define PAYLOAD_WORDS 25

static void __attribute__((noreturn)) fail(sqlite3 *db, const char *what)
{
    say("db BAD %s: %s", what, sqlite3_errmsg(db));
    exit(1);
}

static void execute(sqlite3 *db, const char *sql)
{
    if (sqlite3_exec(db, sql, NULL, NULL, NULL) != SQLITE_OK) {
        fail(db, sql);
    }
}

static sqlite3_stmt *statement(sqlite3 *db, const char *sql)
{
    sqlite3_stmt *s;

    if (sqlite3_prepare_v2(db, sql, -1, &s, NULL) != SQLITE_OK) {
        fail(db, sql);
    }
    return s;
}

static void payload(sqlite3_int64 row, uint64_t *words)
{
    uint64_t seed = page_seed(0xdb, row, 0);

    for (int i = 0; i < PAYLOAD_WORDS; i++, seed += STEP) {
        words[i] = seed;
    }
}

static sqlite3_int64 checksum(const uint64_t *words)
{
    uint64_t sum = 0;

    for (int i = 0; i < PAYLOAD_WORDS; i++) {
        sum = (sum ^ words[i]) * STEP;
    }
    return sum;
}

static void say_commit(uint64_t row)
{
    say("db commit %lu", (unsigned long)row);
}

static void fill_cache(size_t pages)
{
    uint64_t *cache = get_memory(pages * PAGE);

    for (size_t i = 0; i < pages; i++) {
        page_fill(cache + i * WORDS, page_seed(0xdc, i, 0));
    }
}

/* @commit is called with the number of each row that is on the disk. */
static void run(sqlite3 *db, void (*commit)(uint64_t row))
{
    uint64_t words[PAYLOAD_WORDS];
    sqlite3_stmt *insert, *last;
    sqlite3_int64 row;

    execute(db, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE IF NOT EXISTS t"
            " (n INTEGER PRIMARY KEY, payload BLOB, sum INTEGER)");
    insert = statement(db, "INSERT INTO t VALUES (?, ?, ?)");
    last = statement(db, "SELECT coalesce(max(n), 0) FROM t");
    if (sqlite3_step(last) != SQLITE_ROW) {
        fail(db, "max(n)");
    }
    row = sqlite3_column_int64(last, 0);
    sqlite3_finalize(last);
    for (;;) {
        payload(++row, words);
        sqlite3_bind_int64(insert, 1, row);
        sqlite3_bind_blob(insert, 2, words, sizeof(words), SQLITE_STATIC);
        sqlite3_bind_int64(insert, 3, checksum(words));
        /* Outside of BEGIN, a statement is a transaction: durable here. */
        if (sqlite3_step(insert) != SQLITE_DONE) {
            fail(db, "commit");
        }
        sqlite3_reset(insert);
        commit(row);
    }
}

static void check(sqlite3 *db)
{
    uint64_t words[PAYLOAD_WORDS];
    sqlite3_int64 rows = 0;
    sqlite3_stmt *s;
    int result;

    /* One read transaction: all of it looks at one state of the database. */
    execute(db, "BEGIN");
    s = statement(db, "PRAGMA integrity_check");
    if (sqlite3_step(s) != SQLITE_ROW) {
        fail(db, "integrity_check");
    }
    if (strcmp((const char *)sqlite3_column_text(s, 0), "ok") != 0) {
        say("db BAD integrity_check: %.400s", sqlite3_column_text(s, 0));
        exit(1);
    }
    sqlite3_finalize(s);
    s = statement(db, "SELECT n, payload, sum FROM t ORDER BY n");
    while ((result = sqlite3_step(s)) == SQLITE_ROW) {
        rows++;
        payload(rows, words);
        if (sqlite3_column_int64(s, 0) != rows ||
            sqlite3_column_bytes(s, 1) != sizeof(words) ||
            memcmp(sqlite3_column_blob(s, 1), words, sizeof(words)) != 0 ||
            sqlite3_column_int64(s, 2) != checksum(words)) {
            say("db BAD row: expected row %lld, got %lld or damaged contents",
                (long long)rows, (long long)sqlite3_column_int64(s, 0));
            exit(1);
        }
    }
    if (result != SQLITE_DONE) {
        fail(db, "reading the rows");
    }
    sqlite3_finalize(s);
    say("db rows=%lld ok", (long long)rows);
}

int main(int argc, char **argv)
{
    const char *command = argc > 2 ? argv[1] : "";
    sqlite3 *db;

    if (!(argc == 3 && (!strcmp(command, "run") || !strcmp(command, "check")))
        && !(argc == 4 && !strcmp(command, "count"))) {
        errx(1, "usage: database run|check FILE | count FILE CACHE_MB");
    }
    if (sqlite3_open(argv[2], &db) != SQLITE_OK) {
        fail(db, argv[2]);
    }
    sqlite3_busy_timeout(db, 30000);
    if (strcmp(command, "check") == 0) {
        check(db);
    } else if (strcmp(command, "count") == 0) {
        fill_cache((size_t)atoi(argv[3]) * 256);
        run(db, report_operations);
    } else {
        run(db, say_commit);
    }
    sqlite3_close(db);
    return 0;
}

// Run handlers without WebAssembly, with SQLite in memory.
//
//     #include "oncely/testing.h"
//
//     int main(void) {
//         oncely_test_start("migrations");
//         oncely_result result = oncely_test_deliver("{\"id\": \"o1\", \"cents\": 500}");
//         ONCELY_EXPECT(result.kind == ONCELY_OK);
//         ONCELY_EXPECT_TEXT(oncely_test_rows("select id, cents from orders"), "o1|500");
//         return oncely_test_end();
//     }
//
// Build it with the compiler of the machine: `cc test_app.c app.c oncely/*.c -ldl`. SQLite is
// loaded when SQL is used first: the library libsqlite3, without its headers.
//
// The rules of the host on statements, subjects and limits do not apply here. `oncely dev` has
// them.

#ifndef ONCELY_TESTING_H
#define ONCELY_TESTING_H

#include "oncely.h"

// A message that the handler sent.
typedef struct oncely_output {
    const char *id;
    const char *subject;
    oncely_bytes body;
    const oncely_header *headers;
    size_t header_count;
    // NULL when there is none.
    const char *ordering_key;
    uint64_t delay_ms;
} oncely_output;

// Starts a fresh host. `migrations` is the worker's folder of SQL files, which run in order, or
// NULL.
void oncely_test_start(const char *migrations);

// Stops the host and frees its memory. Returns 1 if an expectation has failed since the program
// began, else 0: the exit code of the program.
int oncely_test_end(void);

// Delivers a message with this body, the id `event-1` and the subject `test`. Effects are rolled
// back unless the result is ONCELY_OK. A panic of the handler is a retry with the code `trap`.
oncely_result oncely_test_deliver(const char *body);

// Delivers a message. `origin` may be NULL.
oncely_result oncely_test_deliver_message(oncely_message message);

// The messages that were sent by deliveries that took effect; NULL behind the last one.
const oncely_output *oncely_test_output(size_t at);
size_t oncely_test_output_count(void);

// The rows of a query as text: columns are separated by `|`, and rows by line breaks.
const char *oncely_test_rows(const char *query);

// The value of a key of the state, or NULL.
const char *oncely_test_state(const char *key);

// Values for the handler.
void oncely_test_set_config(const char *key, const char *value);
void oncely_test_set_attempt(uint32_t attempt);
void oncely_test_set_now(uint64_t now);

// Prints a failed expectation, and lets `oncely_test_end` return 1.
#define ONCELY_EXPECT(condition) oncely_test_expect((condition), #condition, __FILE__, __LINE__)
void oncely_test_expect(bool condition, const char *text, const char *file, int line);

// Expects a text. `found` may be NULL.
#define ONCELY_EXPECT_TEXT(found, expected) \
    oncely_test_expect_text((found), (expected), __FILE__, __LINE__)
void oncely_test_expect_text(const char *found, const char *expected, const char *file, int line);

#endif

// Write message handlers for Oncely in C.
//
//     #include "oncely/oncely.h"
//
//     oncely_result oncely_handle(const oncely_message *message) {
//         ONCELY_TRY(oncely_sql_execute("insert into seen (id) values ($1)",
//                                       ONCELY_PARAMS(oncely_text(message->id.data)), NULL));
//         ONCELY_TRY(oncely_send("orders.seen", message->body, NULL));
//         return oncely_ok();
//     }
//
// The effects of SQL, state and outbox belong to one database transaction. `oncely_ok()` commits
// them, once. Every other result, and a trap, rolls all of them back.
//
// Memory: all memory that these functions return belongs to the current message, and is freed after
// it. The same holds for `oncely_alloc`. There is nothing to free. Copy a value that a later
// message of the same instance needs into memory of `malloc`.
//
// Text from the host ends with a NUL byte, which its length does not count. So `data` is a C
// string, unless the text itself contains a NUL byte. Text for the host is UTF-8.

#ifndef ONCELY_H
#define ONCELY_H

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ONCELY_PRINTF(text, first) __attribute__((format(printf, text, first)))
#define ONCELY_CHECKED __attribute__((warn_unused_result))

// Text or bytes with a length.
typedef struct oncely_bytes {
    const char *data;
    size_t length;
} oncely_bytes;

// The bytes of a C string, not copied.
oncely_bytes oncely_string(const char *text);

// Whether bytes equal a C string.
bool oncely_equals(oncely_bytes bytes, const char *text);

// Text as `printf` formats it.
oncely_bytes oncely_format(const char *format, ...) ONCELY_PRINTF(1, 2);

// Memory until the end of the current message, aligned for every type. Traps if there is none.
void *oncely_alloc(size_t size);

// Messages

// A name and a value.
typedef struct oncely_header {
    oncely_bytes name;
    oncely_bytes value;
} oncely_header;

// A position on a stream.
typedef struct oncely_origin {
    oncely_bytes stream;
    uint64_t sequence;
    // Microseconds since the Unix epoch.
    uint64_t stored_at;
} oncely_origin;

// One message, as stored on its stream.
typedef struct oncely_message {
    // The event id, which identifies copies of the same event.
    oncely_bytes id;
    oncely_bytes subject;
    oncely_bytes body;
    // Names and values, in order. A name may appear more than once.
    const oncely_header *headers;
    size_t header_count;
    // NULL when the message did not come from a stream.
    const oncely_origin *origin;
} oncely_message;

// The first value of a header, regardless of case; NULL when the message does not have it.
const char *oncely_header_value(const oncely_message *message, const char *name);

// Results of a handler

typedef enum oncely_result_kind {
    ONCELY_OK,
    ONCELY_RETRY,
    ONCELY_RETRY_AFTER,
    ONCELY_REJECT,
} oncely_result_kind;

// The result of a handler for one message.
typedef struct oncely_result {
    oncely_result_kind kind;
    uint64_t delay_ms;
    // A short, stable name for this kind of failure, or NULL. Dead letters are grouped by it.
    const char *code;
    // One sentence for the operator who reads the dead letter.
    oncely_bytes text;
} oncely_result;

// Commits the effects.
oncely_result oncely_ok(void);

// Retries after a backoff. After the last attempt the message becomes a dead letter.
oncely_result oncely_retry(const char *code, const char *format, ...) ONCELY_PRINTF(2, 3);

// Like `oncely_retry`, but not before the delay has passed.
oncely_result oncely_retry_after(uint64_t delay_ms, const char *code, const char *format, ...)
    ONCELY_PRINTF(3, 4);

// Does not retry: the message becomes a dead letter at once.
oncely_result oncely_reject(const char *code, const char *format, ...) ONCELY_PRINTF(2, 3);

// Retries with the text of the last error, see `oncely_last_error`.
oncely_result oncely_failed(void);

// Returns `oncely_failed()` from the handler if a call returned false.
#define ONCELY_TRY(call)            \
    do {                            \
        if (!(call)) {              \
            return oncely_failed(); \
        }                           \
    } while (0)

// Ends the instance by a trap. The message is retried; the dead letter has the text.
#define oncely_panic(...) oncely_panic_at(__FILE__, __LINE__, __VA_ARGS__)
_Noreturn void oncely_panic_at(const char *file, int line, const char *format, ...)
    ONCELY_PRINTF(3, 4);

// The handler, which the author defines. Each call runs in a fresh instance, unless the manifest
// says otherwise.
oncely_result oncely_handle(const oncely_message *message);

// In its place for the world `batch-worker`: the messages of a batch in one call. `results` has one
// entry for each message, and each is `oncely_ok()` at first. Build it with -DONCELY_BATCH and the
// sources in generated/batch_worker.
void oncely_handle_batch(const oncely_message *messages, oncely_result *results, size_t count);

// Errors

// Why a function returned false.
typedef struct oncely_error {
    // The name of the error in wit/worker.wit, such as `constraint-violation` or `not-granted`.
    const char *reason;
    oncely_bytes text;
    // SQLSTATE on PostgreSQL, the extended result code on SQLite; NULL for other errors.
    const char *code;
    // The violated constraint, where the database names it; else NULL.
    const char *constraint;
    // For `version-mismatch`: whether the key exists, and its version.
    bool exists;
    uint64_t version;
} oncely_error;

// The error of the last function that returned false. An error of SQL and a refused output fail the
// message, even if the handler returns `oncely_ok()`.
const oncely_error *oncely_last_error(void);

// Whether the last error has this reason.
bool oncely_error_is(const char *reason);

// SQL: the worker's own tables, in the same transaction. Placeholders are $1, $2, ...

typedef enum oncely_kind {
    ONCELY_NULL,
    ONCELY_BOOLEAN,
    ONCELY_INT64,
    ONCELY_FLOAT64,
    ONCELY_DECIMAL,
    ONCELY_TEXT,
    ONCELY_BYTES,
    ONCELY_UUID,
    ONCELY_JSON,
    ONCELY_TIMESTAMP,
    ONCELY_DATE,
    ONCELY_TIME,
} oncely_kind;

// The value of a column or parameter. Its field is the one of its kind.
typedef struct oncely_value {
    oncely_kind kind;
    union {
        bool boolean;
        // ONCELY_INT64; ONCELY_TIMESTAMP in microseconds since the Unix epoch.
        int64_t int64;
        double float64;
        // All other kinds, but ONCELY_NULL.
        oncely_bytes bytes;
    } as;
} oncely_value;

oncely_value oncely_null(void);
oncely_value oncely_bool(bool value);
oncely_value oncely_int(int64_t value);
oncely_value oncely_float(double value);
// An exact decimal, such as `12.50`.
oncely_value oncely_decimal(const char *value);
// Text; SQL null for NULL.
oncely_value oncely_text(const char *value);
oncely_value oncely_blob(oncely_bytes value);
oncely_value oncely_uuid(const char *value);
oncely_value oncely_json(const char *value);
// Microseconds since the Unix epoch, UTC.
oncely_value oncely_timestamp(int64_t value);
// Such as `2026-01-31`.
oncely_value oncely_date(const char *value);
// Such as `13:05:59.25`.
oncely_value oncely_time(const char *value);

// The two arguments `params` and `param_count`.
#define ONCELY_PARAMS(...)               \
    (const oncely_value[]){__VA_ARGS__}, \
        sizeof((const oncely_value[]){__VA_ARGS__}) / sizeof(oncely_value)
#define ONCELY_NO_PARAMS NULL, 0

// The rows of a result. The value of row `r` and column `c` is `values[r * column_count + c]`.
typedef struct oncely_rows {
    size_t row_count;
    size_t column_count;
    const oncely_bytes *columns;
    const oncely_value *values;
} oncely_rows;

// Runs a statement and returns its rows.
ONCELY_CHECKED bool oncely_sql_query(const char *statement, const oncely_value *params,
                                     size_t param_count, oncely_rows *rows);

// Runs a statement and returns the number of changed rows; `changed` may be NULL.
ONCELY_CHECKED bool oncely_sql_execute(const char *statement, const oncely_value *params,
                                       size_t param_count, uint64_t *changed);

// Runs a statement later, without a result: before the next query or execute, and in any case
// before the commit. The deferred statements of many messages reach the database together. An error
// from the database fails the message, and its next statement returns it.
ONCELY_CHECKED bool oncely_sql_defer(const char *statement, const oncely_value *params,
                                     size_t param_count);

// Whether the database is SQLite rather than PostgreSQL.
bool oncely_sql_is_sqlite(void);

// The value in a column of a row; NULL when there is no such row or column.
const oncely_value *oncely_row_value(const oncely_rows *rows, size_t row, const char *column);

// The value in a column of a row. They return false, and set nothing, when there is no such row or
// column, when it is SQL null, or when it has another type.
bool oncely_row_bool(const oncely_rows *rows, size_t row, const char *column, bool *value);
bool oncely_row_int(const oncely_rows *rows, size_t row, const char *column, int64_t *value);
bool oncely_row_float(const oncely_rows *rows, size_t row, const char *column, double *value);
// Text of every kind that has one: text, decimal, uuid, json, date, time.
bool oncely_row_text(const oncely_rows *rows, size_t row, const char *column, oncely_bytes *value);
bool oncely_row_blob(const oncely_rows *rows, size_t row, const char *column, oncely_bytes *value);

// Outbox: messages that are published after the transaction has committed, never before.

typedef struct oncely_send_options {
    const oncely_header *headers;
    size_t header_count;
    // NULL for `{worker}:{event id}:{ordinal}`.
    const char *id;
    // Messages with the same key are published in commit order.
    const char *ordering_key;
    // How long after the commit to publish.
    uint64_t delay_ms;
    // A batch handler sets it to the id of the message that caused this one.
    const char *caused_by;
} oncely_send_options;

// Adds a message to the outbox. `options` may be NULL.
ONCELY_CHECKED bool oncely_send(const char *subject, oncely_bytes body,
                                const oncely_send_options *options);

// State: keyed values of this worker, in the same transaction.

// Reads a value. It is a success without a value when the key does not exist: `*exists` is false.
// `version` may be NULL.
ONCELY_CHECKED bool oncely_state_get(const char *key, bool *exists, oncely_bytes *value,
                                     uint64_t *version);

// Sets a value and returns its new version; `version` may be NULL.
ONCELY_CHECKED bool oncely_state_set(const char *key, oncely_bytes value, uint64_t *version);

// Deletes a key; `existed` may be NULL.
ONCELY_CHECKED bool oncely_state_delete(const char *key, bool *existed);

// Sets a value only if the key still has the expected version. NULL expects a missing key. The
// error is `version-mismatch` when it has another one.
ONCELY_CHECKED bool oncely_state_compare_and_set(const char *key, const uint64_t *expected,
                                                 oncely_bytes value, uint64_t *version);

// Cache: values that are cheap to recompute. It is not part of the transaction.

ONCELY_CHECKED bool oncely_cache_get(const char *key, bool *exists, oncely_bytes *value);
ONCELY_CHECKED bool oncely_cache_put(const char *key, oncely_bytes value, uint64_t ttl_ms,
                                     const char *const *tags, size_t tag_count);
ONCELY_CHECKED bool oncely_cache_invalidate(const char *const *tags, size_t tag_count);

// The value of a key in `[worker.config]` of the manifest; NULL when it is not set.
const char *oncely_config(const char *key);

// The current delivery

// An id that is the same for every attempt at this message. Pass it to other systems as an
// idempotency key.
const char *oncely_invocation_id(void);
// The name of the worker.
const char *oncely_worker(void);
// The version of the running deployment.
uint32_t oncely_version(void);
// The number of this attempt, from 1.
uint32_t oncely_attempt(void);
// The number of attempts after which the message becomes a dead letter.
uint32_t oncely_max_attempts(void);
// The time at which this attempt began, in microseconds since the Unix epoch.
uint64_t oncely_now(void);
// The time that the handler has left.
uint64_t oncely_remaining_ms(void);
// The W3C trace context of the message; NULL when it has none.
const char *oncely_traceparent(void);

// Log lines. Standard output and standard error become log lines as well.

typedef enum oncely_level {
    ONCELY_TRACE,
    ONCELY_DEBUG,
    ONCELY_INFO,
    ONCELY_WARN,
    ONCELY_ERROR,
} oncely_level;

void oncely_log(oncely_level level, const char *format, ...) ONCELY_PRINTF(2, 3);

// JSON

typedef enum oncely_json_kind {
    ONCELY_JSON_NULL,
    ONCELY_JSON_BOOLEAN,
    ONCELY_JSON_NUMBER,
    ONCELY_JSON_STRING,
    ONCELY_JSON_ARRAY,
    ONCELY_JSON_OBJECT,
} oncely_json_kind;

// A value of a parsed document.
typedef struct oncely_json_value {
    oncely_json_kind kind;
    bool boolean;
    // The contents of a string, or a number as it is written.
    oncely_bytes text;
    // Its name, if it is in an object.
    oncely_bytes name;
    // The number of values in an array or object, and the first of them.
    size_t count;
    const struct oncely_json_value *first;
    // The next value of the same array or object, or NULL.
    const struct oncely_json_value *next;
} oncely_json_value;

// Parses a document; NULL when it is not JSON, or has more than 64 levels.
const oncely_json_value *oncely_json_parse(oncely_bytes text);

// A value of an object by its name; NULL when there is none. `object` may be NULL or of another
// kind. Of several values with one name it is the last one.
const oncely_json_value *oncely_json_get(const oncely_json_value *object, const char *name);

// The value, if it is one of this kind. They return false, and set nothing, otherwise. `value` may
// be NULL. An integer must be written without a fraction and fit into 64 bits.
bool oncely_json_bool(const oncely_json_value *value, bool *result);
bool oncely_json_int(const oncely_json_value *value, int64_t *result);
bool oncely_json_float(const oncely_json_value *value, double *result);
bool oncely_json_string(const oncely_json_value *value, oncely_bytes *result);

// Text as a JSON string, with its quotes.
const char *oncely_json_quote(oncely_bytes text);

#endif

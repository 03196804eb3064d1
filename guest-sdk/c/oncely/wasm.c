// Oncely as the host: the bindings in generated/ behind the functions of oncely.h.

#include "internal.h"

#ifdef __wasm__

#include <stdlib.h>
#include <string.h>

#ifdef ONCELY_BATCH
#include "generated/batch_worker/bindings.h"
#else
#include "generated/worker/bindings.h"
#endif

// Memory

// Memory for values from the host: one byte longer, for a NUL byte behind text. It replaces the
// function of the bindings, which calls `realloc`.
__attribute__((export_name("cabi_realloc"))) void *cabi_realloc(void *old, size_t old_size,
                                                                size_t align, size_t new_size) {
    if (new_size == 0) {
        return (void *)align;
    }
    if (new_size == SIZE_MAX) {
        oncely_panic("out of memory");
    }
    char *memory = oncely_alloc(new_size + 1);
    memory[new_size] = '\0';
    if (old_size > 0) {
        memcpy(memory, old, old_size < new_size ? old_size : new_size);
    }
    return memory;
}

// Memory for the adapter of WASI 0.1, which keeps it for the life of the instance.
__attribute__((export_name("cabi_realloc_adapter"))) void *
cabi_realloc_adapter(void *old, size_t old_size, size_t align, size_t new_size) {
    (void)old;
    (void)old_size;
    size_t rounded = (new_size + align - 1) / align * align;
    void *memory = aligned_alloc(align, rounded);
    if (memory == NULL) {
        abort();
    }
    return memory;
}

// Values

static oncely_bytes bytes_from(const uint8_t *data, size_t length) {
    return length == 0 ? (oncely_bytes){"", 0} : (oncely_bytes){(const char *)data, length};
}

static oncely_bytes text_from(bindings_string_t text) {
    return bytes_from(text.ptr, text.len);
}

static bindings_string_t text_of(oncely_bytes text) {
    return (bindings_string_t){(uint8_t *)text.data, text.length};
}

static bindings_string_t string_of(const char *text) {
    return text_of(oncely_string(text));
}

static bindings_option_string_t optional_of(const char *text) {
    if (text == NULL) {
        return (bindings_option_string_t){.is_some = false};
    }
    return (bindings_option_string_t){.is_some = true, .val = string_of(text)};
}

static bindings_list_u8_t list_of(oncely_bytes bytes) {
    return (bindings_list_u8_t){(uint8_t *)bytes.data, bytes.length};
}

static void *alloc_array(size_t count, size_t size) {
    if (count > SIZE_MAX / size) {
        oncely_panic("out of memory");
    }
    return oncely_alloc(count * size);
}

// SQL

static oncely_worker_sql_value_t param(oncely_value value) {
    oncely_worker_sql_value_t given = {.tag = ONCELY_WORKER_SQL_VALUE_NULL};
    switch (value.kind) {
    case ONCELY_NULL:
        break;
    case ONCELY_BOOLEAN:
        given.tag = ONCELY_WORKER_SQL_VALUE_BOOLEAN;
        given.val.boolean = value.as.boolean;
        break;
    case ONCELY_INT64:
        given.tag = ONCELY_WORKER_SQL_VALUE_INT64;
        given.val.int64 = value.as.int64;
        break;
    case ONCELY_FLOAT64:
        given.tag = ONCELY_WORKER_SQL_VALUE_FLOAT64;
        given.val.float64 = value.as.float64;
        break;
    case ONCELY_DECIMAL:
        given.tag = ONCELY_WORKER_SQL_VALUE_DECIMAL;
        given.val.decimal = text_of(value.as.bytes);
        break;
    case ONCELY_TEXT:
        given.tag = ONCELY_WORKER_SQL_VALUE_TEXT;
        given.val.text = text_of(value.as.bytes);
        break;
    case ONCELY_BYTES:
        given.tag = ONCELY_WORKER_SQL_VALUE_BYTES;
        given.val.bytes = list_of(value.as.bytes);
        break;
    case ONCELY_UUID:
        given.tag = ONCELY_WORKER_SQL_VALUE_UUID;
        given.val.uuid = text_of(value.as.bytes);
        break;
    case ONCELY_JSON:
        given.tag = ONCELY_WORKER_SQL_VALUE_JSON;
        given.val.json = text_of(value.as.bytes);
        break;
    case ONCELY_TIMESTAMP:
        given.tag = ONCELY_WORKER_SQL_VALUE_TIMESTAMP;
        given.val.timestamp = value.as.int64;
        break;
    case ONCELY_DATE:
        given.tag = ONCELY_WORKER_SQL_VALUE_DATE;
        given.val.date = text_of(value.as.bytes);
        break;
    case ONCELY_TIME:
        given.tag = ONCELY_WORKER_SQL_VALUE_TIME;
        given.val.time = text_of(value.as.bytes);
        break;
    }
    return given;
}

static oncely_value column(oncely_worker_sql_value_t value) {
    oncely_value found = {.kind = ONCELY_NULL};
    switch (value.tag) {
    case ONCELY_WORKER_SQL_VALUE_BOOLEAN:
        return oncely_bool(value.val.boolean);
    case ONCELY_WORKER_SQL_VALUE_INT64:
        return oncely_int(value.val.int64);
    case ONCELY_WORKER_SQL_VALUE_FLOAT64:
        return oncely_float(value.val.float64);
    case ONCELY_WORKER_SQL_VALUE_TIMESTAMP:
        return oncely_timestamp(value.val.timestamp);
    case ONCELY_WORKER_SQL_VALUE_DECIMAL:
        found.kind = ONCELY_DECIMAL;
        found.as.bytes = text_from(value.val.decimal);
        break;
    case ONCELY_WORKER_SQL_VALUE_TEXT:
        found.kind = ONCELY_TEXT;
        found.as.bytes = text_from(value.val.text);
        break;
    case ONCELY_WORKER_SQL_VALUE_BYTES:
        found.kind = ONCELY_BYTES;
        found.as.bytes = bytes_from(value.val.bytes.ptr, value.val.bytes.len);
        break;
    case ONCELY_WORKER_SQL_VALUE_UUID:
        found.kind = ONCELY_UUID;
        found.as.bytes = text_from(value.val.uuid);
        break;
    case ONCELY_WORKER_SQL_VALUE_JSON:
        found.kind = ONCELY_JSON;
        found.as.bytes = text_from(value.val.json);
        break;
    case ONCELY_WORKER_SQL_VALUE_DATE:
        found.kind = ONCELY_DATE;
        found.as.bytes = text_from(value.val.date);
        break;
    case ONCELY_WORKER_SQL_VALUE_TIME:
        found.kind = ONCELY_TIME;
        found.as.bytes = text_from(value.val.time);
        break;
    default:
        break;
    }
    return found;
}

static oncely_worker_sql_list_value_t params_of(const oncely_value *params, size_t count) {
    oncely_worker_sql_value_t *given = alloc_array(count, sizeof *given);
    for (size_t i = 0; i < count; i++) {
        given[i] = param(params[i]);
    }
    return (oncely_worker_sql_list_value_t){given, count};
}

static bool sql_fail(oncely_worker_sql_error_t error) {
    static const char *const REASONS[] = {
        "constraint-violation", "conflict",         "query-failed", "not-allowed",
        "invalid-parameter",    "unsupported-type", "too-large",    "timeout",
        "transaction-failed",   "other",
    };
    const char *reason = REASONS[error.tag];
    const oncely_worker_sql_database_error_t *database;
    switch (error.tag) {
    case ONCELY_WORKER_SQL_ERROR_CONSTRAINT_VIOLATION:
        database = &error.val.constraint_violation;
        break;
    case ONCELY_WORKER_SQL_ERROR_CONFLICT:
        database = &error.val.conflict;
        break;
    case ONCELY_WORKER_SQL_ERROR_QUERY_FAILED:
        database = &error.val.query_failed;
        break;
    case ONCELY_WORKER_SQL_ERROR_TIMEOUT:
        return oncely_fail(reason, oncely_string("the time limit of this delivery was reached"));
    default:
        // The other cases have a text in the same place.
        return oncely_fail(reason, text_from(error.val.other));
    }
    return oncely_fail_with((oncely_error){
        .reason = reason,
        .text = text_from(database->message),
        .code = text_from(database->code).data,
        .constraint = database->constraint.is_some ? text_from(database->constraint.val).data : NULL,
    });
}

bool oncely_sql_query(const char *statement, const oncely_value *params, size_t param_count,
                      oncely_rows *rows) {
    bindings_string_t text = string_of(statement);
    oncely_worker_sql_list_value_t given = params_of(params, param_count);
    oncely_worker_sql_row_set_t found;
    oncely_worker_sql_error_t error;
    if (!oncely_worker_sql_query(&text, &given, &found, &error)) {
        return sql_fail(error);
    }
    size_t row_count = found.rows.len, column_count = found.columns.len;
    oncely_bytes *columns = alloc_array(column_count, sizeof *columns);
    for (size_t at = 0; at < column_count; at++) {
        columns[at] = text_from(found.columns.ptr[at]);
    }
    if (column_count > 0 && row_count > SIZE_MAX / column_count) {
        oncely_panic("out of memory");
    }
    oncely_value *values = alloc_array(row_count * column_count, sizeof *values);
    for (size_t row = 0; row < row_count; row++) {
        for (size_t at = 0; at < column_count; at++) {
            values[row * column_count + at] = column(found.rows.ptr[row].ptr[at]);
        }
    }
    *rows = (oncely_rows){row_count, column_count, columns, values};
    return true;
}

bool oncely_sql_execute(const char *statement, const oncely_value *params, size_t param_count,
                        uint64_t *changed) {
    bindings_string_t text = string_of(statement);
    oncely_worker_sql_list_value_t given = params_of(params, param_count);
    uint64_t count;
    oncely_worker_sql_error_t error;
    if (!oncely_worker_sql_execute(&text, &given, &count, &error)) {
        return sql_fail(error);
    }
    if (changed != NULL) {
        *changed = count;
    }
    return true;
}

bool oncely_sql_defer(const char *statement, const oncely_value *params, size_t param_count) {
    bindings_string_t text = string_of(statement);
    oncely_worker_sql_list_value_t given = params_of(params, param_count);
    oncely_worker_sql_error_t error;
    return oncely_worker_sql_defer(&text, &given, &error) || sql_fail(error);
}

bool oncely_sql_is_sqlite(void) {
    return oncely_worker_sql_get_dialect() == ONCELY_WORKER_SQL_DIALECT_SQLITE;
}

// Outbox

bool oncely_send(const char *subject, oncely_bytes body, const oncely_send_options *options) {
    static const char *const REASONS[] = {
        "invalid-subject", "invalid-header", "invalid-id", "not-granted",
        "too-large",       "too-many",       "other",
    };
    oncely_send_options none = {0};
    if (options == NULL) {
        options = &none;
    }
    bindings_tuple2_string_string_t *headers = alloc_array(options->header_count, sizeof *headers);
    for (size_t i = 0; i < options->header_count; i++) {
        headers[i].f0 = text_of(options->headers[i].name);
        headers[i].f1 = text_of(options->headers[i].value);
    }
    oncely_worker_outbox_outgoing_t outgoing = {
        .subject = string_of(subject),
        .headers = {headers, options->header_count},
        .body = list_of(body),
        .id = optional_of(options->id),
        .ordering_key = optional_of(options->ordering_key),
        .delay = {options->delay_ms > 0, options->delay_ms},
        .caused_by = optional_of(options->caused_by),
    };
    bindings_string_t id;
    oncely_worker_outbox_error_t error;
    if (!oncely_worker_outbox_send(&outgoing, &id, &error)) {
        return oncely_fail(REASONS[error.tag], text_from(error.val.other));
    }
    return true;
}

// State

static bool state_fail(oncely_worker_state_error_t error) {
    static const char *const REASONS[] = {
        "invalid-key", "too-large", "version-mismatch", "transaction-failed", "other",
    };
    if (error.tag != ONCELY_WORKER_STATE_ERROR_VERSION_MISMATCH) {
        return oncely_fail(REASONS[error.tag], text_from(error.val.other));
    }
    bindings_option_u64_t found = error.val.version_mismatch;
    uint64_t version = found.is_some ? found.val : 0;
    oncely_bytes text = oncely_string("version mismatch: the key does not exist");
    if (found.is_some) {
        text = oncely_format("version mismatch: the key is at version %llu",
                             (unsigned long long)version);
    }
    return oncely_fail_with((oncely_error){
        .reason = REASONS[error.tag],
        .text = text,
        .exists = found.is_some,
        .version = version,
    });
}

bool oncely_state_get(const char *key, bool *exists, oncely_bytes *value, uint64_t *version) {
    bindings_string_t name = string_of(key);
    oncely_worker_state_option_entry_t entry;
    oncely_worker_state_error_t error;
    if (!oncely_worker_state_get(&name, &entry, &error)) {
        return state_fail(error);
    }
    *exists = entry.is_some;
    *value = (oncely_bytes){"", 0};
    if (entry.is_some) {
        *value = bytes_from(entry.val.value.ptr, entry.val.value.len);
    }
    if (version != NULL) {
        *version = entry.is_some ? entry.val.version : 0;
    }
    return true;
}

bool oncely_state_set(const char *key, oncely_bytes value, uint64_t *version) {
    bindings_string_t name = string_of(key);
    bindings_list_u8_t bytes = list_of(value);
    uint64_t set;
    oncely_worker_state_error_t error;
    if (!oncely_worker_state_set(&name, &bytes, &set, &error)) {
        return state_fail(error);
    }
    if (version != NULL) {
        *version = set;
    }
    return true;
}

bool oncely_state_delete(const char *key, bool *existed) {
    bindings_string_t name = string_of(key);
    bool deleted;
    oncely_worker_state_error_t error;
    if (!oncely_worker_state_delete(&name, &deleted, &error)) {
        return state_fail(error);
    }
    if (existed != NULL) {
        *existed = deleted;
    }
    return true;
}

bool oncely_state_compare_and_set(const char *key, const uint64_t *expected, oncely_bytes value,
                                  uint64_t *version) {
    bindings_string_t name = string_of(key);
    bindings_list_u8_t bytes = list_of(value);
    uint64_t wanted = expected == NULL ? 0 : *expected;
    uint64_t set;
    oncely_worker_state_error_t error;
    if (!oncely_worker_state_compare_and_set(&name, expected == NULL ? NULL : &wanted, &bytes, &set,
                                             &error)) {
        return state_fail(error);
    }
    if (version != NULL) {
        *version = set;
    }
    return true;
}

// Cache

static bool cache_fail(oncely_worker_cache_error_t error) {
    static const char *const REASONS[] = {
        "invalid-key", "invalid-tag", "invalid-ttl", "too-large", "too-many", "other",
    };
    return oncely_fail(REASONS[error.tag], text_from(error.val.other));
}

static bindings_list_string_t tags_of(const char *const *tags, size_t count) {
    bindings_string_t *given = alloc_array(count, sizeof *given);
    for (size_t i = 0; i < count; i++) {
        given[i] = string_of(tags[i]);
    }
    return (bindings_list_string_t){given, count};
}

bool oncely_cache_get(const char *key, bool *exists, oncely_bytes *value) {
    bindings_string_t name = string_of(key);
    bindings_option_list_u8_t found;
    oncely_worker_cache_error_t error;
    if (!oncely_worker_cache_get(&name, &found, &error)) {
        return cache_fail(error);
    }
    *exists = found.is_some;
    *value = found.is_some ? bytes_from(found.val.ptr, found.val.len) : (oncely_bytes){"", 0};
    return true;
}

bool oncely_cache_put(const char *key, oncely_bytes value, uint64_t ttl_ms, const char *const *tags,
                      size_t tag_count) {
    bindings_string_t name = string_of(key);
    bindings_list_u8_t bytes = list_of(value);
    bindings_list_string_t given = tags_of(tags, tag_count);
    oncely_worker_cache_error_t error;
    return oncely_worker_cache_put(&name, &bytes, ttl_ms, &given, &error) || cache_fail(error);
}

bool oncely_cache_invalidate(const char *const *tags, size_t tag_count) {
    bindings_list_string_t given = tags_of(tags, tag_count);
    oncely_worker_cache_error_t error;
    return oncely_worker_cache_invalidate(&given, &error) || cache_fail(error);
}

// Configuration and the current delivery

const char *oncely_config(const char *key) {
    bindings_string_t name = string_of(key);
    bindings_option_string_t found;
    wasi_config_store_error_t error;
    if (!wasi_config_store_get(&name, &found, &error) || !found.is_some) {
        return NULL;
    }
    return text_from(found.val).data;
}

const char *oncely_invocation_id(void) {
    bindings_string_t id;
    oncely_worker_invocation_id(&id);
    return text_from(id).data;
}

const char *oncely_worker(void) {
    bindings_string_t name;
    oncely_worker_invocation_worker(&name);
    return text_from(name).data;
}

uint32_t oncely_version(void) {
    return oncely_worker_invocation_version();
}

uint32_t oncely_attempt(void) {
    return oncely_worker_invocation_attempt();
}

uint32_t oncely_max_attempts(void) {
    return oncely_worker_invocation_max_attempts();
}

uint64_t oncely_now(void) {
    return oncely_worker_invocation_now();
}

uint64_t oncely_remaining_ms(void) {
    return oncely_worker_invocation_remaining();
}

const char *oncely_traceparent(void) {
    bindings_string_t context;
    return oncely_worker_invocation_traceparent(&context) ? text_from(context).data : NULL;
}

// Logging

static void write_log(wasi_logging_logging_level_t level, const char *topic, oncely_bytes line) {
    bindings_string_t context = string_of(topic), message = text_of(line);
    wasi_logging_logging_log(level, &context, &message);
}

void oncely_write_log(oncely_level level, oncely_bytes line) {
    write_log((wasi_logging_logging_level_t)level, "", line);
}

void oncely_write_panic(oncely_bytes text) {
    write_log(WASI_LOGGING_LOGGING_LEVEL_CRITICAL, "panic", text);
}

// Handlers

static oncely_message message_from(const oncely_worker_types_message_t *given) {
    oncely_header *headers = alloc_array(given->headers.len, sizeof *headers);
    for (size_t i = 0; i < given->headers.len; i++) {
        headers[i].name = text_from(given->headers.ptr[i].f0);
        headers[i].value = text_from(given->headers.ptr[i].f1);
    }
    oncely_origin *origin = NULL;
    if (given->origin.is_some) {
        origin = oncely_alloc(sizeof *origin);
        origin->stream = text_from(given->origin.val.stream);
        origin->sequence = given->origin.val.sequence;
        origin->stored_at = given->origin.val.stored_at;
    }
    return (oncely_message){
        .id = text_from(given->id),
        .subject = text_from(given->subject),
        .body = bytes_from(given->body.ptr, given->body.len),
        .headers = headers,
        .header_count = given->headers.len,
        .origin = origin,
    };
}

static oncely_worker_types_failure_t failure_of(oncely_result result) {
    oncely_worker_types_failure_t failure = {
        .kind.tag = ONCELY_WORKER_TYPES_FAILURE_KIND_RETRY,
        .code = optional_of(result.code),
        .message = text_of(result.text),
    };
    if (result.kind == ONCELY_REJECT) {
        failure.kind.tag = ONCELY_WORKER_TYPES_FAILURE_KIND_REJECT;
    } else if (result.kind == ONCELY_RETRY_AFTER) {
        failure.kind.tag = ONCELY_WORKER_TYPES_FAILURE_KIND_RETRY_AFTER;
        failure.kind.val.retry_after = result.delay_ms;
    }
    return failure;
}

// The functions after a call free all memory at once. They replace those of the bindings, which
// free the failures one by one.

#ifdef ONCELY_BATCH

void exports_oncely_worker_batch_handler_handle_batch(
    exports_oncely_worker_batch_handler_list_message_t *given,
    exports_oncely_worker_batch_handler_list_result_void_failure_t *returned) {
    size_t count = given->len;
    oncely_message *messages = alloc_array(count, sizeof *messages);
    oncely_result *results = alloc_array(count, sizeof *results);
    for (size_t i = 0; i < count; i++) {
        messages[i] = message_from(&given->ptr[i]);
        results[i] = oncely_ok();
    }
    oncely_handle_batch(messages, results, count);
    returned->ptr = alloc_array(count, sizeof *returned->ptr);
    returned->len = count;
    for (size_t i = 0; i < count; i++) {
        returned->ptr[i].is_err = results[i].kind != ONCELY_OK;
        if (returned->ptr[i].is_err) {
            returned->ptr[i].val.err = failure_of(results[i]);
        }
    }
}

void after_batch(uint8_t *area) __asm__(
    "__wasm_export_exports_oncely_worker_batch_handler_handle_batch_post_return");
__attribute__((export_name("cabi_post_oncely:worker/batch-handler@0.1.0#handle-batch"))) void
after_batch(uint8_t *area) {
    (void)area;
    oncely_free_all();
}

#else

bool exports_oncely_worker_handler_handle(exports_oncely_worker_handler_message_t *given,
                                          exports_oncely_worker_handler_failure_t *failure) {
    oncely_message message = message_from(given);
    oncely_result result = oncely_handle(&message);
    if (result.kind == ONCELY_OK) {
        return true;
    }
    *failure = failure_of(result);
    return false;
}

void after_message(uint8_t *area) __asm__(
    "__wasm_export_exports_oncely_worker_handler_handle_post_return");
__attribute__((export_name("cabi_post_oncely:worker/handler@0.1.0#handle"))) void
after_message(uint8_t *area) {
    (void)area;
    oncely_free_all();
}

#endif

#endif

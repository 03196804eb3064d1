// The functions that need no host: memory, values, results, rows.

#include "internal.h"

#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Memory: blocks that are filled from their start, and freed together.

typedef struct block {
    struct block *next;
    size_t size;
    size_t used;
    alignas(max_align_t) unsigned char data[];
} block;

enum { BLOCK_SIZE = 16 * 1024 };

static block *blocks;

static _Noreturn void out_of_memory(void) {
    oncely_write_panic(oncely_string("panicked at oncely.c:\nout of memory"));
    abort();
}

static block *new_block(size_t size) {
    if (size > SIZE_MAX - sizeof(block)) {
        out_of_memory();
    }
    block *made = malloc(sizeof(block) + size);
    if (made == NULL) {
        out_of_memory();
    }
    made->next = NULL;
    made->size = size;
    made->used = 0;
    return made;
}

void *oncely_alloc(size_t size) {
    const size_t align = alignof(max_align_t);
    if (size > SIZE_MAX - align) {
        out_of_memory();
    }
    size_t rounded = (size + align - 1) / align * align;
    if (rounded > BLOCK_SIZE / 4) {
        // A block of its own, behind the one that is being filled
        block *own = new_block(rounded);
        own->used = rounded;
        if (blocks != NULL) {
            own->next = blocks->next;
            blocks->next = own;
        } else {
            blocks = own;
        }
        return own->data;
    }
    if (blocks == NULL || blocks->size - blocks->used < rounded) {
        block *fresh = new_block(BLOCK_SIZE);
        fresh->next = blocks;
        blocks = fresh;
    }
    void *start = blocks->data + blocks->used;
    blocks->used += rounded;
    return start;
}

static oncely_error last_error;

void oncely_free_all(void) {
    while (blocks != NULL) {
        block *next = blocks->next;
        free(blocks);
        blocks = next;
    }
    last_error = (oncely_error){0};
}

oncely_bytes oncely_copy(const void *data, size_t length) {
    if (length == SIZE_MAX) {
        out_of_memory();
    }
    char *copy = oncely_alloc(length + 1);
    if (length > 0) {
        memcpy(copy, data, length);
    }
    copy[length] = '\0';
    return (oncely_bytes){copy, length};
}

// Text

oncely_bytes oncely_string(const char *text) {
    return (oncely_bytes){text, strlen(text)};
}

bool oncely_equals(oncely_bytes bytes, const char *text) {
    size_t length = strlen(text);
    return bytes.length == length && (length == 0 || memcmp(bytes.data, text, length) == 0);
}

oncely_bytes oncely_format_list(const char *format, va_list arguments) {
    va_list again;
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (length < 0) {
        oncely_panic("invalid format: %s", format);
    }
    char *text = oncely_alloc((size_t)length + 1);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    return (oncely_bytes){text, (size_t)length};
}

oncely_bytes oncely_format(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes text = oncely_format_list(format, arguments);
    va_end(arguments);
    return text;
}

static char lower(char c) {
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

static bool equals_ignoring_case(oncely_bytes bytes, const char *text) {
    if (bytes.length != strlen(text)) {
        return false;
    }
    for (size_t i = 0; i < bytes.length; i++) {
        if (lower(bytes.data[i]) != lower(text[i])) {
            return false;
        }
    }
    return true;
}

const char *oncely_header_value(const oncely_message *message, const char *name) {
    for (size_t i = 0; i < message->header_count; i++) {
        if (equals_ignoring_case(message->headers[i].name, name)) {
            return message->headers[i].value.data;
        }
    }
    return NULL;
}

// Results

oncely_result oncely_ok(void) {
    return (oncely_result){.kind = ONCELY_OK, .text = {"", 0}};
}

oncely_result oncely_retry(const char *code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes text = oncely_format_list(format, arguments);
    va_end(arguments);
    return (oncely_result){.kind = ONCELY_RETRY, .code = code, .text = text};
}

oncely_result oncely_retry_after(uint64_t delay_ms, const char *code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes text = oncely_format_list(format, arguments);
    va_end(arguments);
    return (oncely_result){ONCELY_RETRY_AFTER, delay_ms, code, text};
}

oncely_result oncely_reject(const char *code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes text = oncely_format_list(format, arguments);
    va_end(arguments);
    return (oncely_result){.kind = ONCELY_REJECT, .code = code, .text = text};
}

oncely_result oncely_failed(void) {
    const oncely_error *error = oncely_last_error();
    if (error->code == NULL) {
        return oncely_retry(NULL, "%s", error->text.data);
    }
    if (error->constraint != NULL && strstr(error->text.data, error->constraint) == NULL) {
        return oncely_retry(NULL, "%s (constraint %s, code %s)", error->text.data,
                            error->constraint, error->code);
    }
    return oncely_retry(NULL, "%s (code %s)", error->text.data, error->code);
}

void oncely_panic_at(const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes text = oncely_format_list(format, arguments);
    va_end(arguments);
    // The host recognises this form.
    oncely_write_panic(oncely_format("panicked at %s:%d:\n%s", file, line, text.data));
    abort();
}

void oncely_log(oncely_level level, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    oncely_bytes line = oncely_format_list(format, arguments);
    va_end(arguments);
    oncely_write_log(level, line);
}

// Errors

bool oncely_fail_with(oncely_error error) {
    last_error = error;
    return false;
}

bool oncely_fail(const char *reason, oncely_bytes text) {
    return oncely_fail_with((oncely_error){.reason = reason, .text = text});
}

const oncely_error *oncely_last_error(void) {
    if (last_error.reason == NULL) {
        last_error = (oncely_error){.reason = "", .text = oncely_string("there is no error")};
    }
    return &last_error;
}

bool oncely_error_is(const char *reason) {
    return strcmp(oncely_last_error()->reason, reason) == 0;
}

// SQL values

static oncely_value text_of_kind(oncely_kind kind, const char *value) {
    if (value == NULL) {
        return oncely_null();
    }
    return (oncely_value){.kind = kind, .as.bytes = oncely_string(value)};
}

oncely_value oncely_null(void) {
    return (oncely_value){.kind = ONCELY_NULL};
}

oncely_value oncely_bool(bool value) {
    return (oncely_value){.kind = ONCELY_BOOLEAN, .as.boolean = value};
}

oncely_value oncely_int(int64_t value) {
    return (oncely_value){.kind = ONCELY_INT64, .as.int64 = value};
}

oncely_value oncely_float(double value) {
    return (oncely_value){.kind = ONCELY_FLOAT64, .as.float64 = value};
}

oncely_value oncely_decimal(const char *value) {
    return text_of_kind(ONCELY_DECIMAL, value);
}

oncely_value oncely_text(const char *value) {
    return text_of_kind(ONCELY_TEXT, value);
}

oncely_value oncely_blob(oncely_bytes value) {
    return (oncely_value){.kind = ONCELY_BYTES, .as.bytes = value};
}

oncely_value oncely_uuid(const char *value) {
    return text_of_kind(ONCELY_UUID, value);
}

oncely_value oncely_json(const char *value) {
    return text_of_kind(ONCELY_JSON, value);
}

oncely_value oncely_timestamp(int64_t value) {
    return (oncely_value){.kind = ONCELY_TIMESTAMP, .as.int64 = value};
}

oncely_value oncely_date(const char *value) {
    return text_of_kind(ONCELY_DATE, value);
}

oncely_value oncely_time(const char *value) {
    return text_of_kind(ONCELY_TIME, value);
}

// Rows

const oncely_value *oncely_row_value(const oncely_rows *rows, size_t row, const char *column) {
    if (row >= rows->row_count) {
        return NULL;
    }
    for (size_t at = 0; at < rows->column_count; at++) {
        if (oncely_equals(rows->columns[at], column)) {
            return &rows->values[row * rows->column_count + at];
        }
    }
    return NULL;
}

bool oncely_row_bool(const oncely_rows *rows, size_t row, const char *column, bool *value) {
    const oncely_value *found = oncely_row_value(rows, row, column);
    if (found != NULL && found->kind == ONCELY_BOOLEAN) {
        *value = found->as.boolean;
        return true;
    }
    // SQLite has no booleans.
    if (found != NULL && found->kind == ONCELY_INT64 &&
        (found->as.int64 == 0 || found->as.int64 == 1)) {
        *value = found->as.int64 == 1;
        return true;
    }
    return false;
}

bool oncely_row_int(const oncely_rows *rows, size_t row, const char *column, int64_t *value) {
    const oncely_value *found = oncely_row_value(rows, row, column);
    if (found == NULL || (found->kind != ONCELY_INT64 && found->kind != ONCELY_TIMESTAMP)) {
        return false;
    }
    *value = found->as.int64;
    return true;
}

bool oncely_row_float(const oncely_rows *rows, size_t row, const char *column, double *value) {
    const oncely_value *found = oncely_row_value(rows, row, column);
    if (found == NULL || found->kind != ONCELY_FLOAT64) {
        return false;
    }
    *value = found->as.float64;
    return true;
}

bool oncely_row_text(const oncely_rows *rows, size_t row, const char *column, oncely_bytes *value) {
    const oncely_value *found = oncely_row_value(rows, row, column);
    if (found == NULL) {
        return false;
    }
    switch (found->kind) {
    case ONCELY_DECIMAL:
    case ONCELY_TEXT:
    case ONCELY_UUID:
    case ONCELY_JSON:
    case ONCELY_DATE:
    case ONCELY_TIME:
        *value = found->as.bytes;
        return true;
    case ONCELY_NULL:
    case ONCELY_BOOLEAN:
    case ONCELY_INT64:
    case ONCELY_FLOAT64:
    case ONCELY_BYTES:
    case ONCELY_TIMESTAMP:
        break;
    }
    return false;
}

bool oncely_row_blob(const oncely_rows *rows, size_t row, const char *column, oncely_bytes *value) {
    const oncely_value *found = oncely_row_value(rows, row, column);
    if (found == NULL || found->kind != ONCELY_BYTES) {
        return false;
    }
    *value = found->as.bytes;
    return true;
}
